"""A linear layer that is as fast as a processor allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear`; in float32 on a processor as a convolution with a kernel of one pixel.

    The default matrix product of PyTorch leaves the AVX-512 units of many processors idle.
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


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias)
