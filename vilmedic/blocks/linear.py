"""Fast linear layers: float32 on a CPU runs as a convolution through oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear`; in float32 on a CPU as a convolution with a kernel of one pixel.

    The default matrix product of PyTorch leaves the AVX-512 units of many CPUs idle.
    Convolutions are computed by oneDNN, which uses them; forward and backward take half the time
    there, and equal time elsewhere. Results differ by rounding only.

    Args:
        x: [..., d].
        weight: [D, d].
        bias: [D].

    Returns:
        [..., D].
    """
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or not single or not _ONEDNN:
        return functional.linear(x, weight, bias)
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last: no copy
    found = functional.conv2d(pixels, weight[:, :, None, None], bias)
    return found.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def linear_of_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map of few rows, several times as fast as `functional.linear` on a CPU.

    There the weight is the left factor, so that it is read in memory order.

    Args:
        x: [B, 1, d] or [B, d].
        weight: [D, d].
        bias: [D].

    Returns:
        [B, 1, D] or [B, D].
    """
    if x.device.type != "cpu":
        return functional.linear(x, weight, bias)
    rows = x.flatten(0, -2).t()
    found = weight @ rows if bias is None else torch.addmm(bias[:, None], weight, rows)
    return found.t().unflatten(0, x.shape[:-1])


def product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product of 16-bit or float32 factors with float32 sums and result.

    Args:
        left: [B, M, K].
        right: [B, K, N], of the same dtype.
    """
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias)
