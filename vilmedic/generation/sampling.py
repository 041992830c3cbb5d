"""Drawing the tokens of an image, one after another, from one or several trained transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vilmedic.models.dalle import DALLE


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits.

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
    passed = shares.cumsum(dim=1, dtype=torch.float64)
    found = torch.searchsorted(passed, numbers[:, None] * passed[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[1] - 1)


@torch.inference_mode()
def generate_tokens(
    models: Sequence[DALLE],
    ids: Tensor,
    mask: Tensor,
    numbers: Tensor,
    sampling: Sampling,
    *,
    start: Tensor | None = None,
    cached: bool = True,
    progress: Callable[[int], object] = lambda drawn: None,
) -> Tensor:
    """Draw the image tokens of reports.

    Args:
        models: in evaluation mode, with one VAE; their logits are averaged.
        ids: reports, [B, T].
        mask: 1 for the tokens of a report, [B, T].
        numbers: uniform random numbers, float64 [B, N], one a token. The same numbers give the
            same tokens, whichever reports are in the batch.
        sampling: how tokens are drawn.
        start: first tokens of the images, [B, n], to go on from.
        cached: remember keys, values and shifted channels; otherwise compute everything again for
            each token, which gives the same and is slow.
        progress: is told the number of tokens drawn since it was last called.

    Returns:
        int64 [B, N].
    """
    batch, length = numbers.shape
    guided = sampling.cond_scale != 1
    tokens = ids.new_zeros((batch, length))
    first = 0 if start is None else start.shape[1]
    if start is not None:
        tokens[:, :first] = start
    streams = [_Stream(model, ids, mask, guided=guided, cached=cached) for model in models]
    vocabulary = models[0].num_text_tokens + models[0].num_image_tokens
    places = torch.arange(length, device=ids.device)
    for place in range(first, length):
        total: Tensor | None = None
        for stream in streams:
            logits = stream.logits(tokens, place, places, fresh=place == first)
            if guided:
                with_text, without = logits.chunk(2)
                logits = without + sampling.cond_scale * (with_text - without)
            total = logits if total is None else total + logits
        assert total is not None
        tokens[:, place] = draw(total / len(streams), numbers[:, place], sampling, vocabulary)
        progress(batch)
    return tokens


class _Stream:
    """The texts of a batch in one model, and beside them, with guidance, the same without text."""

    def __init__(
        self, model: DALLE, ids: Tensor, mask: Tensor, *, guided: bool, cached: bool
    ) -> None:
        self.model, self.copies = model, 2 if guided else 1
        text = model.text_tokens(ids, mask)
        if guided:
            text = torch.cat((text, model.text_tokens(ids, torch.zeros_like(mask))))
        self.text = text
        self.cache = model.transformer.make_cache(len(text)) if cached else None

    def logits(self, tokens: Tensor, place: int, places: Tensor, *, fresh: bool) -> Tensor:
        """Logits of the token at a place, given those before it."""
        if self.cache is None or fresh:
            before = tokens[:, :place].repeat(self.copies, 1)
            return self.model.begin_image(self.text, before, self.cache)
        last = tokens[:, place - 1].repeat(self.copies)
        return self.model.next_image_token(last, places[place - 1 : place], self.cache)
