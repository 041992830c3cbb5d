from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.losses import reference
from vilmedic.losses.ntxent import NTXentLoss, ntxent_loss


def views(batch: int = 6, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, width, generator=generator, dtype=torch.float64)
        .mul(3)
        .to(dtype)
        .requires_grad_()
        for _ in range(2)
    ]


@pytest.mark.parametrize("tau", [0.05, 0.5, 2.0])
def test_equals_the_double_sum_of_the_paper(tau: float) -> None:
    inputs = views()
    loss, expected = ntxent_loss(*inputs, tau), reference.ntxent(*inputs, tau)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(loss, inputs)
    for gradient, slow in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(gradient, slow, rtol=0, atol=1e-10)


def test_gradient_equals_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda *inputs: ntxent_loss(*inputs, 0.5), views(batch=3))


def test_equals_a_published_implementation() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    first, second = views(batch=16, width=8, dtype=torch.float32)
    labels = torch.arange(16).repeat(2)
    published = losses.NTXentLoss(temperature=0.1)(torch.cat([first, second]), labels)
    torch.testing.assert_close(ntxent_loss(first, second, 0.1), published)


def test_known_value_of_orthogonal_images() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    expected = math.log(math.exp(1 / 0.5) + 6) - 1 / 0.5
    assert ntxent_loss(eye, eye, 0.5).item() == pytest.approx(expected, abs=1e-12)


def test_symmetric_in_the_views_and_independent_of_norms() -> None:
    first, second = views()
    loss = ntxent_loss(first, second, 0.5)
    torch.testing.assert_close(ntxent_loss(second, first, 0.5), loss)
    torch.testing.assert_close(ntxent_loss(7 * first, second / 100, 0.5), loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = views(batch=32, width=16, dtype=dtype)
    loss = ntxent_loss(*inputs, 0.05)
    assert loss.dtype == torch.float32
    exact = [half.detach().double().requires_grad_() for half in inputs]
    expected = ntxent_loss(*exact, 0.05)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert gradient.dtype == dtype
        assert (gradient - wanted).norm() < 0.01 * wanted.norm()


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = views(batch=32, width=16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ntxent_loss(*inputs, 0.05)
    torch.testing.assert_close(loss, ntxent_loss(*inputs, 0.05), rtol=0, atol=0)


def test_keeps_one_square_tensor_for_backward() -> None:
    batch = 32
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    inputs = views(batch=batch, width=4, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = ntxent_loss(*inputs, 0.5)
    assert [size for size in sizes.values() if size >= batch * batch] == [4 * batch * batch]
    loss.backward()


def test_module_uses_its_setting() -> None:
    first, second = views()
    torch.testing.assert_close(NTXentLoss()(first, second)["loss"], ntxent_loss(first, second, 0.5))
    loss = NTXentLoss(tau=0.2)
    torch.testing.assert_close(loss(first, second)["loss"], ntxent_loss(first, second, 0.2))
    assert "tau=0.2" in repr(loss)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_bad_temperature_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="tau above 0"):
        ntxent_loss(*views(), tau)


def test_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 1 and needs at least two images"):
        ntxent_loss(*views(batch=1), 0.5)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4, 3, 1), (4, 3, 1))])
def test_mismatched_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"two tensors \[B, D\] of the same shape, not \[4, 3"):
        ntxent_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 0.5)
