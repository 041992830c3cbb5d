"""Inputs of losses, and a comparison of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pairs(size: int = 6, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Both sides of a batch of pairs, with unequal norms and means."""
    random = torch.Generator().manual_seed(3)
    sides = []
    for scale, mean in ((0.6, 0.2), (1.4, -0.5)):
        side = torch.randn(size, width, generator=random, dtype=torch.float64) * scale + mean
        sides.append(side.to(dtype).requires_grad_())
    return sides


def assert_same_gradients(
    loss: Tensor, expected: Tensor, inputs: Sequence[Tensor], bound: float = 1e-10
) -> None:
    """Check that the gradients of two losses differ by less than a bound and are not zero."""
    given = torch.autograd.grad(loss, inputs)
    for one, other in zip(given, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=bound)
        assert one.abs().max() > 1e-6
