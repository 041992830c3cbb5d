"""Training health: batch statistics, and warnings that name a cause."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.datasets.aligned import TOKEN_HASH
from vilmedic.log import LOGGER, counted
from vilmedic.models.contract import ContrastiveModel, Features

CHANCE = 0.97  # of the loss of uninformative features
COLLAPSED = 0.03  # of the spread of features that fill the sphere
DUPLICATES = 0.25
PATIENCE = 200  # steps
FEWEST = 5  # logged steps
TIE = 1e-6  # of cosines in float32


class StuckWarning:
    """Watches the diagnostics of logged steps and warns when a run is stuck.

    A run is stuck if its mean loss over `patience` steps in a row is that of uninformative
    features. While it stays stuck the warning is repeated after twice as many steps each time.

    Args:
        patience: steps before the first warning.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self._wait = patience
        self._seen: deque[tuple[int, Mapping[str, float]]] = deque()

    def look(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """Take in the diagnostics of a step.

        Args:
            step: the optimizer step.
            numbers: what `contrastive_diagnostics` gave; nothing for other models.

        Returns:
            The warning, which is also logged, or None.
        """
        if "loss_over_ln_batch" not in numbers:
            return None
        self._seen.append((step, numbers))
        while len(self._seen) > FEWEST and step - self._seen[1][0] >= self._wait:
            self._seen.popleft()
        if len(self._seen) < FEWEST or step - self._seen[0][0] < self._wait:
            return None
        if self._mean("loss_over_ln_batch") < CHANCE:
            self._wait = self.patience
            return None
        steps = step - self._seen[0][0]
        text = (
            f"Nothing was learned in the last {steps} steps: the loss is "
            f"{self._mean('loss_over_ln_batch'):.3f} times that of guessing. {self._cause()}"
        )
        LOGGER.warning(text)
        self._wait *= 2
        return text

    def _mean(self, name: str) -> float:
        values = [numbers[name] for _, numbers in self._seen if name in numbers]
        return sum(values) / len(values) if values else 0.0

    def _cause(self) -> str:
        """The likeliest reason, the most certain ones first."""
        names = [name for name in self._seen[-1][1] if name.startswith("feature_std_")]
        for name in names:
            if (spread := self._mean(name)) < COLLAPSED:
                what = name.removeprefix("feature_std_")
                return (
                    f"The '{what}' features have collapsed: all samples are embedded alike "
                    f"(standard deviation {spread:.3f}, 1 is an even spread). Try a smaller "
                    "learning rate, a warm-up, trainor.clip_grad_norm, or another seed; frozen or "
                    "missing pretrained weights have the same effect."
                )
        if (share := self._mean("duplicate_reports")) > DUPLICATES:
            return (
                f"{share:.0%} of the reports of a batch repeat another one word for word, so that "
                "their pairs cannot be distinguished. Try model.targets=same_text, data without "
                "template reports, sampled sentences (dataset.seq.sample_sentence) or a smaller "
                "batch."
            )
        return (
            "Features are spread out, and still no pair is found. Check that line n of the image "
            "file and line n of the report file are one sample, and try another learning rate or "
            "temperature."
        )


class Observed:
    """The features that a model contrasted last, without their graph."""

    def __init__(self) -> None:
        self.features: Features = {}


@contextmanager
def observing(model: Any, wanted: bool) -> Iterator[Observed]:
    """Keep the features of own samples that a contrastive model compares in this context.

    Nothing is computed here, so that steps are the same whether they are logged or not.

    Args:
        model: any model; those that are not contrastive are left alone.
        wanted: whether anything is kept.
    """
    observed = Observed()
    if not wanted or not isinstance(model, ContrastiveModel):
        yield observed
        return

    def keep(features: Features) -> None:
        observed.features = {key: value.detach() for key, value in features.items()}

    model.observer = keep
    try:
        yield observed
    finally:
        model.observer = None


@torch.no_grad()
def contrastive_diagnostics(
    model: Any, features: Features, loss: float, batch: Mapping[str, Any], size: int
) -> dict[str, float]:
    """Health metrics, which separate a stuck or collapsed run from a healthy one.

    Args:
        model: gives the compared features and the loss at chance.
        features: those of one batch, as `contrast` got them; of a batch that is spread over
            processes those of this process.
        loss: the loss of the batch.
        batch: the batch; `input_ids` [B, T], or `token_hash` [B], are looked through for
            duplicates.
        size: samples of the whole batch.

    Returns:
        `loss_over_ln_batch`: the loss over that of features that tell nothing, ln(B) for a
        cross-entropy over the batch; 1 is chance. `in_batch_r1`: share of samples whose partner is
        the nearest in the batch, mean of both directions. `feature_std_<name>`: standard deviation
        of the L2-normalised features over the batch, times the root of their width: 1 when they
        spread evenly over the sphere, 0 when all are the same. `temperature`, and
        `duplicate_reports`: share of reports that repeat another one of the batch.
    """
    first, second = (features.get(name) for name in model.contrast_needs[:2])
    numbers: dict[str, float] = {}
    if first is None or second is None or first.ndim != 2 or first.shape != second.shape:
        return numbers
    chance = model.chance_loss(size)
    if chance:
        numbers["loss_over_ln_batch"] = loss / chance
    one, other = (functional.normalize(value.float(), dim=1) for value in (first, second))
    numbers["in_batch_r1"] = in_batch_r1(one, other)
    for name, unit in zip(model.contrast_needs, (one, other), strict=False):
        numbers[f"feature_std_{name}"] = feature_std(unit)
    temperature = model.temperature_of(features)
    if temperature is not None:
        numbers["temperature"] = temperature
    reports = batch.get("input_ids", batch.get(TOKEN_HASH))
    if reports is not None:
        numbers["duplicate_reports"] = duplicates(reports)
    return numbers


def in_batch_r1(one: Tensor, other: Tensor) -> float:
    """Recall at 1 of pairs within a batch, mean of both directions; ties are misses.

    Cosines within `TIE` are ties: those of equal features round differently by their place.

    Args:
        one: L2-normalised features [B, D].
        other: those of their partners, in the same order.
    """
    similarity = one @ other.T
    own = similarity.diagonal().clone()
    similarity.fill_diagonal_(-torch.inf)
    hits = [(own > similarity.amax(dim=axis) + TIE).float().mean() for axis in (0, 1)]
    return ((hits[0] + hits[1]) / 2).item()


def feature_std(unit: Tensor) -> float:
    """Standard deviation of L2-normalised features [B, D] over the batch, times root D."""
    deviation: Tensor = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    return deviation.item()


def duplicates(rows: Tensor) -> float:
    """Share of the rows [B, ...] of a batch that repeat another one: 1 - distinct / B."""
    return 1 - len(torch.unique(rows, dim=0)) / len(rows)


def warn_of_collapsed_codes(model: Any, batches: Iterable[Tensor]) -> str | None:
    """Warn when the frozen VAE of a DALLE gives all images almost the same few codes.

    A transformer over such codes trains well, as they are easy to guess, and draws nothing.

    Args:
        model: has the size of the codebook, `num_image_tokens`, and the VAE's file, `vae_ckpt`.
        batches: codes of images, int64 [B, N] each.

    Returns:
        The warning, which is also logged, or None.
    """
    from vilmedic.metrics.reconstruction import codebook_use, is_collapsed  # for DALLE only

    codes = torch.cat([batch.cpu() for batch in batches])
    size = model.num_image_tokens
    perplexity, used = codebook_use(codes, size)
    if not is_collapsed(perplexity, size, codes.numel()):
        return None
    text = (
        f"The codebook of model.vae.ckpt={model.vae_ckpt} has collapsed: on "
        f"{counted(len(codes), 'image')} it uses {used} of {size} codes, with a perplexity of "
        f"{perplexity:.1f}, so that DALLE cannot "
        "draw more than these. Train the VAE again with model.kl_div_loss_weight above 0, a higher "
        "model.temperature, a lower learning rate or for longer."
    )
    LOGGER.warning(text)
    return text
