from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning.losses import VICRegLoss as Published
from torch import Tensor

from tests.losses.inputs import assert_same_gradients, pairs
from vilmedic.errors import ArgumentError
from vilmedic.losses.vicreg import VICRegLoss


def slow_terms(first: Tensor, second: Tensor) -> list[Tensor]:
    """Equations 1 and 3 to 5 of the paper, number by number."""
    size, width = first.shape
    zero = first.new_zeros(())
    invariance, variance, covariance = zero, zero, zero
    for n in range(size):
        for i in range(width):
            invariance = invariance + (first[n, i] - second[n, i]) ** 2 / (size * width)
    for side in (first, second):
        means = [sum(side[n, i] for n in range(size)) / size for i in range(width)]
        for i in range(width):
            for j in range(width):
                products = [(side[n, i] - means[i]) * (side[n, j] - means[j]) for n in range(size)]
                entry = sum(products) / (size - 1)
                if i == j:
                    lack = 1 - torch.sqrt(entry + 1e-4)
                    variance = variance + torch.clamp(lack, min=0) / (2 * width)
                else:
                    covariance = covariance + entry**2 / width
    return [invariance, variance, covariance]


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 2.0, 0.3)])
def test_equals_the_equations_with_gradients(weights: tuple[float, float, float]) -> None:
    names = ("invariance", "variance", "covariance")
    loss = VICRegLoss(**{f"{name}_weight": w for name, w in zip(names, weights, strict=True)})
    inputs = pairs()
    given, terms = loss(*inputs), slow_terms(*inputs)
    for name, term in zip(names, terms, strict=True):
        assert term > 0
        torch.testing.assert_close(given[name], term.detach(), rtol=0, atol=1e-10)
    expected = sum(w * term for w, term in zip(weights, terms, strict=True))
    torch.testing.assert_close(given["loss"], expected, rtol=0, atol=1e-10)
    assert_same_gradients(given["loss"], expected, inputs)


def test_equals_a_published_implementation() -> None:
    first, second = pairs(16, 8, torch.float32)
    published = Published()(first, ref_emb=second)
    torch.testing.assert_close(VICRegLoss()(first, second)["loss"], published)


def test_collapsed_embeddings_are_not_optimal() -> None:
    same = torch.ones(8, 4, requires_grad=True)
    collapsed = VICRegLoss()(same, same)
    assert collapsed["loss"].item() == pytest.approx(25 * (1 - 0.01))
    collapsed["loss"].backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()
    spread = torch.cat([torch.eye(4), -torch.eye(4)]) * 2
    assert VICRegLoss()(spread, spread)["loss"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = pairs(16, 32, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        given = VICRegLoss()(*inputs)["loss"]
    exact = VICRegLoss()(*[side.double() for side in inputs])["loss"]
    assert given.dtype == torch.float32
    assert given.item() == pytest.approx(exact.item(), rel=1e-5)


def test_invalid_inputs_and_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        VICRegLoss()(torch.ones(1, 4), torch.ones(1, 4))
    with pytest.raises(ArgumentError, match="all three weights are 0"):
        VICRegLoss(invariance_weight=0, variance_weight=0, covariance_weight=0)
