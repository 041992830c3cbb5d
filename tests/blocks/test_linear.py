"""The linear layer computed as a convolution equals PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.blocks.linear import Linear, linear


def gradients(map_: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    found = map_(*leaves, *([None] if bias is None else []))  # type: ignore[operator]
    scale = torch.linspace(-1, 1, found.numel()).view_as(found)
    return [found.detach(), *torch.autograd.grad((found.float() * scale).sum(), leaves)]


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (2, 1, 4, 12), (12,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_linear_map_of_pytorch(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(9, 12)
    bias = torch.randn(9) if with_bias else None
    mine, other = (gradients(f, x, weight, bias) for f in (linear, functional.linear))
    for one, two in zip(mine, other, strict=True):
        assert one.shape == two.shape
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_accepts_non_contiguous_rows() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(12, 6, 5).permute(2, 1, 0), torch.randn(9, 12)
    torch.testing.assert_close(linear(x, weight, None), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_float64_keeps_its_precision() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 12).double(), torch.randn(9, 12).double()
    assert torch.equal(linear(x, weight, None), functional.linear(x, weight))


def test_follows_autocast() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 12), torch.randn(9, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(x, weight, None)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, functional.linear(x, weight))


def test_layer_has_the_same_parameters_as_pytorch() -> None:
    torch.manual_seed(0)
    layer, other = Linear(12, 9), torch.nn.Linear(12, 9)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-5)
