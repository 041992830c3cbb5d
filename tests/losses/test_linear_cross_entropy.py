from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vilmedic.losses.linear_cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_equals_the_cross_entropy_of_all_logits(block: int) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, generator=random, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(13, generator=random, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(13, (11,), generator=random)

    loss = linear_cross_entropy(hidden, weight, bias, targets, block=block)
    expected = functional.cross_entropy(functional.linear(hidden, weight, bias), targets)

    torch.testing.assert_close(loss, expected)
    inputs = (hidden, weight, bias)
    found = torch.autograd.grad(3 * loss, inputs)
    wanted = torch.autograd.grad(3 * expected, inputs)
    for first, second in zip(found, wanted, strict=True):
        torch.testing.assert_close(first, second)


def test_reduced_precision_stays_close() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=random, requires_grad=True)
    weight = torch.randn(50, 32, generator=random, requires_grad=True)
    bias, targets = torch.zeros(50), torch.randint(50, (40,), generator=random)
    exact = linear_cross_entropy(hidden, weight, bias, targets)
    [expected] = torch.autograd.grad(exact, weight)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    [found] = torch.autograd.grad(loss, weight)

    assert loss.dtype == found.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)


def test_nothing_is_saved_without_gradients() -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    with torch.inference_mode():
        loss = linear_cross_entropy(hidden, weight, torch.zeros(5), torch.tensor([0, 1, 2, 4]))
    assert not loss.requires_grad


@pytest.mark.parametrize("classes", [40, 512])
@pytest.mark.parametrize("hidden_kind", [torch.float32, torch.float16])
def test_float16_keeps_the_gradient_of_many_rows(classes: int, hidden_kind: torch.dtype) -> None:
    """As many rows as a DALLE step has: a factor of 1 / N would underflow in float16."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(12288, 16, generator=random).to(hidden_kind).requires_grad_()
    weight = torch.randn(classes, 16, generator=random).mul(0.02).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    targets = torch.randint(classes, (12288,), generator=random)
    scale = 2.0**16

    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    found = torch.autograd.grad(loss * scale, (hidden, weight, bias))
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight, bias)]
    wanted = torch.autograd.grad(
        functional.cross_entropy(functional.linear(*exact), targets), exact
    )

    assert [value.dtype for value in found] == [hidden_kind, torch.float32, torch.float32]
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() / scale - other).norm() / other.norm()
        assert error < 0.005


def test_float16_does_not_overflow_where_all_rows_are_of_one_class() -> None:
    hidden = torch.full((12288, 4), 8.0, requires_grad=True)
    weight, bias = torch.zeros(40, 4, requires_grad=True), torch.zeros(40)
    targets = torch.zeros(12288, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    [found] = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found[0], torch.full((4,), -8 * 39 / 40), rtol=1e-3, atol=0)
