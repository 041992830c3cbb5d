"""Representation metrics: alignment, uniformity, effective rank and spread."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.config.types import Between, Share
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.metrics.contract import Metric

logger = logging.getLogger(__name__)


FEATURES = ("visual", "linguistic", "visual_backbone")
PARTNERS = ("linguistic", "visual_second")


class Representation(Metric):
    """Alignment, uniformity and effective rank, with a warning when a representation collapses.

    On features normalised to length 1: alignment is the mean squared distance of a pair (image and
    report, or two views), and uniformity the logarithm of the mean of exp(-2 d^2) over all pairs of
    samples (Wang and Isola 2020); both are better when lower. Effective rank is the exponential of
    the entropy of the normalised singular values (Roy and Vetterli 2007), of the features less
    their mean: between 1 and the width, 0 when all samples are alike. Spread is the mean squared
    distance from the mean: 0 when all samples are alike, 1 when they point everywhere.

    Args:
        features: the features to measure; null takes visual, linguistic and visual_backbone, as
            far as the model has them.
        max_samples: samples used, drawn with the evaluation's seed where a split has more.
        collapse_rank: an effective rank below this is reported as a collapse.
        collapse_spread: a spread below this is reported as a collapse.
    """

    numbers: ClassVar = {
        "alignment": "lower",
        "*_uniformity": "lower",
        "*_effective_rank": "higher",
        "*_spread": "higher",
    }

    def __init__(
        self,
        *,
        features: list[str] | None = None,
        max_samples: Annotated[int, Between(2, 1000000)] = 5000,
        collapse_rank: Annotated[float, Between(0, 65536)] = 2.0,
        collapse_spread: Share = 0.001,
    ) -> None:
        self.features = features
        self.max_samples = max_samples
        self.collapse_rank = collapse_rank
        self.collapse_spread = collapse_spread

    def check(self, evaluation: Evaluation) -> None:
        """Refuse features that the model does not give."""
        for name in self.features or ():
            evaluation.check_feature(name, "features")

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`alignment`, and for each feature `<name>_{uniformity,effective_rank,spread}`."""
        size = len(evaluation.features)
        generator = torch.Generator().manual_seed(evaluation.seed)
        rows = torch.randperm(size, generator=generator)[: self.max_samples].sort().values
        there = evaluation.features.features
        wanted = self.features or [name for name in FEATURES if name in there]
        partner = next((name for name in PARTNERS if name in there), "linguistic")
        found = {name: evaluation.feature(name) for name in {*wanted, "visual", partner}}
        unit = {
            name: functional.normalize(value.flatten(1)[rows].double(), dim=1)
            for name, value in found.items()
            if value is not None
        }
        results: dict[str, Any] = {"alignment": None}
        if "visual" in unit and partner in unit:
            distance = (unit["visual"] - unit[partner]).square().sum(dim=1)
            results["alignment"] = distance.mean().item()
        for name in wanted:
            enough = name in unit and size > 1
            results[f"{name}_uniformity"] = uniformity(unit[name]) if enough else None
            rank = effective_rank(unit[name]) if enough else None
            extent = spread(unit[name]) if enough else None
            results |= {f"{name}_effective_rank": rank, f"{name}_spread": extent}
            if rank is None or extent is None or evaluation.baseline:
                continue
            if rank < self.collapse_rank or extent < self.collapse_spread:
                logger.warning(
                    "%s, split %s: '%s' has collapsed: effective rank %.2f of %d, spread %.2g. "
                    "The samples are hardly distinguishable.",
                    evaluation.name,
                    evaluation.split,
                    name,
                    rank,
                    unit[name].shape[1],
                    extent,
                )
        return results


def uniformity(unit: Tensor, block: int = 1024) -> float:
    """Logarithm of the mean of exp(-2 d^2) over the pairs of different samples.

    Args:
        unit: features of length 1, [N, D].
        block: rows of distances held at a time.
    """
    total = 0.0
    for start in range(0, len(unit), block):
        similarity = unit[start : start + block] @ unit.T
        total += torch.exp(4 * similarity - 4).sum().item()
    pairs = len(unit) * (len(unit) - 1)
    itself = torch.exp(4 * unit.square().sum(dim=1) - 4).sum().item()
    return math.log((total - itself) / pairs)


def effective_rank(unit: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of centred features [N, D]."""
    values = torch.linalg.svdvals(unit - unit.mean(dim=0))
    if values.sum() < 1e-9 * len(unit):
        return 0.0
    shares = values / values.sum()
    return math.exp(torch.special.entr(shares).sum().item())


def spread(unit: Tensor) -> float:
    """Mean squared distance of features of length 1, [N, D], from their mean."""
    return (unit - unit.mean(dim=0)).square().sum(dim=1).mean().item()
