"""Rotary position embeddings over a report and the two axes of the image that follows it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BASE = 10000.0
FAR_FROM_TEXT = 8192.0  # the text position of every image token
FAR_FROM_IMAGE = -10.0  # the row and column of every text token; the image spans -1 to 1
MOST_TURNS = 5.0  # half turns of the fastest image frequency, a unit of the image


def rotary_angles(text_len: int, side: int, dim_head: int) -> Tensor:
    """The angles by which the pairs of channels of a head turn at each position.

    A third of the head turns with the text position (RoFormer, arXiv:2104.09864), a third with the
    image row and a third with the image column, both in -1 to 1. Each angle is there twice, for
    the two channels of its pair; what is left of the head does not turn.

    Args:
        text_len: text positions, the begin token included.
        side: image positions along a side.
        dim_head: channels of a head.

    Returns:
        float32 [1, text_len + side ** 2, R], R at most `dim_head`.
    """
    third = dim_head // 3
    pairs = third // 2
    language = BASE ** -(torch.arange(0, third, 2)[:pairs].float() / third)
    pixel = torch.linspace(1.0, MOST_TURNS, pairs) * math.pi
    image_len = side**2
    order = torch.cat((torch.arange(text_len).float(), torch.full((image_len,), FAR_FROM_TEXT)))
    axis = torch.linspace(-1.0, 1.0, side)
    outside = torch.full((text_len,), FAR_FROM_IMAGE)
    rows = torch.cat((outside, axis.repeat_interleave(side)))
    columns = torch.cat((outside, axis.repeat(side)))
    turns = [order[:, None] * language, rows[:, None] * pixel, columns[:, None] * pixel]
    return torch.cat(turns, dim=1).repeat_interleave(2, dim=1)[None]


def rotation(angles: Tensor, dim_head: int) -> Tensor:
    """Angles as factors of whole heads.

    Args:
        angles: [n, R].
        dim_head: channels of a head, D.

    Returns:
        Cosines, and sines with the sign that they have in the rotation, [2, n, D].
    """
    still = dim_head - angles.shape[-1]
    cosines = torch.nn.functional.pad(angles.cos(), (0, still), value=1.0)
    sines = torch.nn.functional.pad(angles.sin(), (0, still))
    signs = sines.new_ones(dim_head)
    signs[::2] = -1
    return torch.stack((cosines, sines * signs))


class _Turn(torch.autograd.Function):
    """Keeps nothing of its input: the gradient turns back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(x, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turned(gradients[0], cosines, -sines), None, None


def turn(x: Tensor, factors: Tensor) -> Tensor:
    """Turn heads by the angles of their positions.

    Args:
        x: heads, [B, n, ..., D]; computed in the precision of `factors`.
        factors: what `rotation` gives, with as many axes after n as `x` has: [2, n, ..., D].

    Returns:
        Like `x`.
    """
    turned: Tensor = _Turn.apply(x, factors[0], factors[1])
    return turned


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    paired = x.shape[-1] // 2 * 2
    swapped = x[..., :paired].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    if paired < x.shape[-1]:
        swapped = torch.cat((swapped, x[..., paired:]), dim=-1)  # its sine is zero
    return torch.addcmul(x * cosines, swapped, sines).to(x.dtype)
