"""Redundancy reduction of Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import Weight
from vilmedic.losses.convirt import check_pairs


def barlow_twins_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation of the cross-correlation of two sides of pairs from the identity.

    With c_ij the correlation over the batch of feature i of one side and feature j of the other,
    the terms are the sum of (1 - c_ii)^2 and the sum over i != j of c_ij^2 (equations 1 and 2).
    Features are normalised as batch normalisation does it, as in the authors' code. Half precision
    is widened to float32, under autocast as well.

    Args:
        first: embeddings of one side of each pair, [B, D], not normalised.
        second: those of the other side, [B, D], in the same order.

    Returns:
        The invariance and the redundancy, scalars.

    Raises:
        ValueError: if the shapes differ, or the batch holds fewer than two pairs.
    """
    check_pairs("barlow_twins_terms", first, second)
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        one, other = (
            functional.batch_norm(side.to(wide), None, None, training=True)
            for side in (first, second)
        )
        correlation = one.T @ other / len(one)
        invariance = (1 - correlation.diagonal()).square().sum()
        redundancy = correlation.fill_diagonal_(0).square().sum()
    return invariance, redundancy


class BarlowTwinsLoss(nn.Module):
    """The weighted sum of `barlow_twins_terms`; needs no negatives, and so no large batch.

    It needs the embeddings of all pairs of the batch at once: with several processes each gets
    those of all.

    Args:
        redundancy_weight: lambda in the paper; the invariance has weight 1. Not named `lambda_`, so
            that a run that changes only the loss keeps no weight of `ConVIRTLoss`.
    """

    negatives: ClassVar[bool] = False

    def __init__(self, *, redundancy_weight: Weight = 0.005) -> None:
        super().__init__()
        self.redundancy_weight = redundancy_weight

    def forward(self, visual: Tensor, linguistic: Tensor) -> dict[str, Tensor]:
        """The loss and its terms.

        Args:
            visual: embeddings of the images, [B, D].
            linguistic: embeddings of the reports, or of other views of the images, [B, D].

        Returns:
            Scalars `loss`, and without gradient and weight `invariance` and `redundancy`.
        """
        invariance, redundancy = barlow_twins_terms(visual, linguistic)
        return {
            "loss": invariance + self.redundancy_weight * redundancy,
            "invariance": invariance.detach(),
            "redundancy": redundancy.detach(),
        }

    def chance_loss(self, size: int) -> None:
        """Return None: the loss does not distinguish samples."""

    def extra_repr(self) -> str:
        """The setting, as `print(model)` shows it."""
        return f"redundancy_weight={self.redundancy_weight}"
