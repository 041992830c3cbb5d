"""What a batch tells about the health of contrastive training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.distributed.gather import Part
from vilmedic.models.contract import ContrastiveModel, Features

TIE = 1e-6  # of cosines in float32


class Observed:
    """The features that a model contrasted last, without their graph."""

    def __init__(self) -> None:
        self.features: Features = {}


@contextmanager
def observing(model: Any, wanted: bool) -> Iterator[Observed]:
    """Keep what a contrastive model's `contrast` is given while the context lasts.

    Nothing is computed here, so that a step that is not logged costs nothing and a step that is
    logged is the same step.

    Args:
        model: any model; those that are not contrastive are left alone.
        wanted: whether anything is kept.
    """
    observed = Observed()
    if not wanted or not isinstance(model, ContrastiveModel):
        yield observed
        return
    contrast, contrast_part = model.contrast, model.contrast_part

    def keep(features: Features) -> dict[str, Tensor]:
        observed.features = {key: value.detach() for key, value in features.items()}
        return contrast(features)

    def keep_part(features: Features, part: Part) -> dict[str, Tensor]:
        result = contrast_part(features, part)
        observed.features = {key: value.detach() for key, value in features.items()}
        return result

    model.contrast, model.contrast_part = keep, keep_part  # type: ignore[method-assign]
    try:
        yield observed
    finally:
        del model.contrast, model.contrast_part


@torch.no_grad()
def contrastive_diagnostics(
    model: Any, features: Features, loss: float, batch: Mapping[str, Any], size: int
) -> dict[str, float]:
    """The numbers by which a stuck or collapsed run is told from a healthy one.

    Args:
        model: says which features are compared, and what a loss of no information is.
        features: those of one batch, as `contrast` got them; of a batch that is spread over
            processes those of this process.
        loss: the loss of the batch.
        batch: the batch; `input_ids` [B, T] are looked through for duplicates.
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
        numbers[f"feature_std_{name}"] = spread(unit)
    temperature = model.temperature_of(features)
    if temperature is not None:
        numbers["temperature"] = temperature
    if "input_ids" in batch:
        numbers["duplicate_reports"] = duplicates(batch["input_ids"])
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


def spread(unit: Tensor) -> float:
    """Standard deviation of L2-normalised features [B, D] over the batch, times root D."""
    deviation: Tensor = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    return deviation.item()


def duplicates(rows: Tensor) -> float:
    """Share of the rows [B, ...] of a batch that repeat another one: 1 - distinct / B."""
    return 1 - len(torch.unique(rows, dim=0)) / len(rows)
