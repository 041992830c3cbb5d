"""Autoregressive sampling of image tokens from one or several trained transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from vilmedic.device import inference, weights_converted_once, widest_float
from vilmedic.models.dalle import DALLE

WARM_STEPS = 2  # run without a graph, so that libraries initialise


@dataclass(frozen=True)
class Sampling:
    """Sampling settings for the next token.

    Args:
        temperature: divides the logits; small values keep to the likeliest tokens.
        filter_thres: share of the logits that is dropped, the smallest ones. It counts the text
            vocabulary too, as dalle-pytorch does: 0.9 of 2,064 words and 2,048 codes leaves 411.
        top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
        cond_scale: guidance: how far to go from the logits without the text to those with it,
            and beyond (arXiv:2207.12598); 1 takes those with the text.
    """

    temperature: float = 1.0
    filter_thres: float = 0.5
    top_p: float = 1.0
    cond_scale: float = 1.0


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling, vocabulary: int) -> Tensor:
    """Draw a token from each row of logits.

    Args:
        logits: [B, K].
        numbers: uniform random numbers in 0..1, float64 [B]: a token is where the cumulative
            probability passes its number.
        sampling: how.
        vocabulary: number of words and codes together, which `filter_thres` is a share of.

    Returns:
        int64 [B].
    """
    logits = logits.float()
    kept = min(max(int((1 - sampling.filter_thres) * vocabulary), 1), logits.shape[1])
    if kept < logits.shape[1]:
        smallest = logits.topk(kept, dim=1, sorted=True).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    shares = (logits / sampling.temperature).softmax(dim=1)
    if sampling.top_p < 1:
        ranked, order = shares.sort(dim=1, descending=True)
        beyond = ranked.cumsum(dim=1) - ranked >= sampling.top_p
        shares = shares.masked_fill(beyond.scatter(1, order, beyond), 0.0)
    passed = shares.cumsum(dim=1, dtype=widest_float(shares.device))
    found = torch.searchsorted(passed, numbers[:, None] * passed[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[1] - 1)


def generate_tokens(
    models: Sequence[DALLE],
    ids: Tensor,
    mask: Tensor,
    numbers: Tensor,
    sampling: Sampling,
    *,
    start: Tensor | None = None,
    precision: str = "fp32",
    cached: bool = True,
    progress: Callable[[int], object] = lambda drawn: None,
) -> Tensor:
    """Draw the image tokens of one batch of reports; see `TokenDrawing`.

    Args:
        models: in evaluation mode, with one VAE; their logits are averaged.
        ids: reports, [B, T].
        mask: 1 for the tokens of a report, [B, T].
        numbers: uniform random numbers, float64 [B, N], one per token. The same numbers give the
            same tokens for any other reports in the batch; in 16 bits a batch of another size may
            round otherwise.
        sampling: how tokens are drawn.
        start: first tokens of the images, [B, n], to resume from.
        precision: `fp32`, `bf16` or `fp16`.
        cached: remember keys, values and shifted channels; otherwise compute everything again for
            each token, which gives the same and is slow.
        progress: receives the number of tokens drawn since its last call.

    Returns:
        int64 [B, N].
    """
    with TokenDrawing(models, sampling, precision=precision, cached=cached) as drawing:
        return drawing(ids, mask, numbers, start=start, progress=progress)


class TokenDrawing(AbstractContextManager["TokenDrawing"]):
    """Draws the image tokens of any number of batches of reports, in a `with` statement.

    16-bit weights, caches, and on a GPU the recorded kernels of a step are kept between batches.
    Weights must not change until the end.

    Args:
        models: in evaluation mode on their device, with one VAE; their logits are averaged.
        sampling: how tokens are drawn.
        precision: `fp32`, `bf16` or `fp16`.
        cached: see `generate_tokens`.
    """

    def __init__(
        self,
        models: Sequence[DALLE],
        sampling: Sampling,
        *,
        precision: str = "fp32",
        cached: bool = True,
    ) -> None:
        self.models, self.sampling = models, sampling
        self.precision, self.cached = precision, cached
        self.device = next(models[0].parameters()).device
        self._kept = ExitStack()
        self._steps: _Steps | None = None

    def __enter__(self) -> TokenDrawing:
        self._kept.enter_context(weights_converted_once(self.device, self.precision, *self.models))
        return self

    def __exit__(self, *_: object) -> None:
        self._steps = None  # its kernels read the converted weights
        self._kept.close()

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor,
        numbers: Tensor,
        *,
        start: Tensor | None = None,
        progress: Callable[[int], object] = lambda drawn: None,
    ) -> Tensor:
        """The tokens of a batch, int64 [B, N]; see `generate_tokens` for the arguments."""
        with inference(self.device, self.precision):
            if self._steps is None or self._steps.numbers.shape != numbers.shape:
                self._steps = None  # frees its memory for the next one
                self._steps = _Steps(
                    self.models, self.sampling, torch.zeros_like(numbers), cached=self.cached
                )
            return self._steps.draw_all(ids, mask, numbers, start, progress)


class _Steps:
    """The steps in which the tokens of a batch are drawn.

    Everything that changes between steps, including the position of the token, is in tensors at
    fixed addresses: all steps run the same kernels.

    Args:
        models: see `TokenDrawing`.
        sampling: how tokens are drawn.
        numbers: where the random numbers of a batch will be, float64 [B, N].
        cached: see `generate_tokens`.
    """

    def __init__(
        self, models: Sequence[DALLE], sampling: Sampling, numbers: Tensor, *, cached: bool
    ) -> None:
        self.sampling, self.numbers = sampling, numbers
        self.guided = sampling.cond_scale != 1
        copies = len(numbers) * (2 if self.guided else 1)
        self.streams = [_Stream(model, copies, cached=cached) for model in models]
        self.vocabulary = models[0].num_text_tokens + models[0].num_image_tokens
        self.tokens = torch.zeros_like(numbers, dtype=torch.int64)
        self.place = torch.zeros(1, dtype=torch.int64, device=numbers.device)
        self._recorded: Callable[[], None] | None = None

    def draw_all(
        self,
        ids: Tensor,
        mask: Tensor,
        numbers: Tensor,
        start: Tensor | None,
        progress: Callable[[int], object],
    ) -> Tensor:
        """The tokens of a batch, int64 [B, N]; see `generate_tokens`."""
        batch, length = self.numbers.shape
        first = 0 if start is None else start.shape[1]
        self.numbers.copy_(numbers)
        self.place.fill_(first)
        if start is not None:
            self.tokens[:, :first] = start
        before = self.tokens[:, :first]
        self._draw([stream.begin(ids, mask, before, self.guided) for stream in self.streams])
        progress(batch)
        for number in range(1, length - first):
            if number > WARM_STEPS and self._recorded is None:
                self._recorded = recorded(self.step, self.numbers.device)
            (self._recorded or self.step)()
            progress(batch)
        return self.tokens.clone()

    def step(self) -> None:
        """Draw the token of the place, and continue with the next place."""
        self._draw([stream.next(self.tokens, self.place) for stream in self.streams])

    def _draw(self, every: list[Tensor]) -> None:
        total: Tensor | None = None
        for logits in every:
            if self.guided:
                with_text, without = logits.chunk(2)
                logits = without + self.sampling.cond_scale * (with_text - without)
            total = logits if total is None else total + logits
        assert total is not None
        numbers = self.numbers.index_select(1, self.place)[:, 0]
        drawn = draw(total / len(every), numbers, self.sampling, self.vocabulary)
        self.tokens.index_copy_(1, self.place, drawn[:, None])
        self.place.add_(1)


class _Stream:
    """The texts of a batch in one model; with guidance also the same images without text."""

    def __init__(self, model: DALLE, copies: int, *, cached: bool) -> None:
        self.model, self.copies = model, copies
        self.cache = model.transformer.make_cache(copies) if cached else None
        self.output = model.image_output()

    def begin(self, ids: Tensor, mask: Tensor, before: Tensor, guided: bool) -> Tensor:
        """Read the reports of a batch and the first tokens of its images: logits of the next."""
        text = self.model.text_tokens(ids, mask)
        if guided:
            text = torch.cat((text, self.model.text_tokens(ids, torch.zeros_like(mask))))
        self.text = text
        if self.cache is not None:
            self.cache.clear()
        return self.model.begin_image(text, self._all(before), self.cache, self.output)

    def next(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Logits of the token at a place, int64 [1], given those before it in `tokens`."""
        if self.cache is None:
            before = self._all(tokens[:, : int(place)])
            return self.model.begin_image(self.text, before, None, self.output)
        last = place - 1
        token = self._all(tokens.index_select(1, last))[:, 0]
        return self.model.next_image_token(token, last, self.cache, self.output)

    def _all(self, tokens: Tensor) -> Tensor:
        """Return the tokens for each text; with guidance repeated for the part without text."""
        return tokens.repeat(self.copies // len(tokens), 1)


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record the step as one CUDA graph, which launches its hundreds of kernels at once.

    Args:
        step: reads and writes tensors at fixed addresses, waits for nothing, and has run before.
        device: where; a CPU takes the step as it is.
    """
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    # Only for this thread: another may be pinning memory of training batches.
    capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with torch.cuda.device(device), capture:
        step()
    return graph.replay
