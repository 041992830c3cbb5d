"""Shares of the training labels that a protocol is given, from few to all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read_fractions(fractions: Sequence[float] | None) -> list[float]:
    """The shares in ascending order; all labels when there are none.

    Args:
        fractions: shares, each above 0 and at most 1.
    """
    return sorted(set(fractions or [1.0]))


def nested_subsets(size: int, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Rows of each share of a split: prefixes of one seeded permutation, two rows at least.

    Args:
        size: number of samples of the split.
        fractions: the shares.
        seed: seed of the permutation.

    Returns:
        For each share its rows, int64; the smaller lie within the larger.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return [order[: max(2, round(share * size))] for share in fractions]
