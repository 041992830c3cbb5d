"""Variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv 2105.04906)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import Weight
from vilmedic.errors import ArgumentError
from vilmedic.losses.convirt import check_pairs

EPS = 1e-4
"""Added to a variance, since the square root has no gradient at zero."""


def vicreg_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance terms of VICReg.

    The invariance is the mean squared difference of the pairs (equation 5). The variance is the
    shortfall of the standard deviation of a feature over the batch to 1, the mean over the features
    (equation 1) and over both sides, as in the authors' code; the paper adds up both sides. The
    covariance is the sum of the squared off-diagonal covariances of one side over D (equations 3
    and 4), added up over both sides. Half precision is widened to float32, under autocast as well.

    Args:
        first: embeddings of one side of each pair, [B, D], not normalised.
        second: those of the other side, [B, D], in the same order.

    Returns:
        Invariance, variance and covariance, scalars.

    Raises:
        ValueError: if the shapes differ, or the batch holds fewer than two pairs.
    """
    check_pairs("vicreg_terms", first, second)
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        one, other = first.to(wide), second.to(wide)
        invariance = functional.mse_loss(one, other)
        variance, covariance = one.new_zeros(()), one.new_zeros(())
        for side in (one, other):
            centred = side - side.mean(0)
            spread = (centred.square().sum(0) / (len(side) - 1) + EPS).sqrt()
            variance = variance + functional.relu(1 - spread).mean() / 2
            matrix = centred.T @ centred / (len(side) - 1)
            covariance = covariance + matrix.fill_diagonal_(0).square().sum() / side.shape[1]
    return invariance, variance, covariance


class VICRegLoss(nn.Module):
    """The weighted sum of `vicreg_terms`; needs no negatives, and so no large batch.

    It needs the embeddings of all pairs of the batch at once: with several processes each gets
    those of all.

    Args:
        invariance_weight: weight of the differences of pairs.
        variance_weight: weight of the shortfall of standard deviations.
        covariance_weight: weight of the covariances.
    """

    negatives: ClassVar[bool] = False

    def __init__(
        self,
        *,
        invariance_weight: Weight = 25.0,
        variance_weight: Weight = 25.0,
        covariance_weight: Weight = 1.0,
    ) -> None:
        super().__init__()
        if invariance_weight == variance_weight == covariance_weight == 0:
            raise ArgumentError({"": "all three weights are 0."})
        self.weights = (invariance_weight, variance_weight, covariance_weight)

    def forward(self, visual: Tensor, linguistic: Tensor) -> dict[str, Tensor]:
        """The loss and its terms.

        Args:
            visual: embeddings of the images, [B, D].
            linguistic: embeddings of the reports, or of other views of the images, [B, D].

        Returns:
            Scalars `loss`, and without gradient and weight `invariance`, `variance` and
            `covariance`.
        """
        terms = vicreg_terms(visual, linguistic)
        named = zip(("invariance", "variance", "covariance"), terms, strict=True)
        loss = torch.stack([w * term for w, term in zip(self.weights, terms, strict=True)]).sum()
        return {"loss": loss, **{name: term.detach() for name, term in named}}

    def chance_loss(self, size: int) -> None:
        """Return None: the loss does not distinguish samples."""

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        invariance, variance, covariance = self.weights
        return (
            f"invariance_weight={invariance}, variance_weight={variance}, "
            f"covariance_weight={covariance}"
        )
