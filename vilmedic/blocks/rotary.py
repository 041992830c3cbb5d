"""Rotary position embeddings over a report and the two axes of the image that follows it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    language = 1.0 / BASE ** (torch.arange(0, third, 2)[:pairs].float() / third)
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
        angles: [n, R], each angle twice.
        dim_head: channels of a head, D.

    Returns:
        Cosine and sine of each pair of channels, [n, D // 2, 2].
    """
    angles = functional.pad(angles[:, ::2], (0, dim_head // 2 - angles.shape[-1] // 2))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def turn(heads: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn queries, keys and values by the angles of their positions, and take them apart.

    Args:
        heads: of each position queries, keys and values of all heads, [B, n, 3, heads, D].
        factors: what `rotation` gives for the n positions; the precision to compute in.

    Returns:
        Queries, keys and values like the input, each [B, heads, n, D].
    """
    query, key, value = _Turn.apply(heads, factors[:, None, None])
    return query, key, value


def turn_one(heads: Tensor, factors: Tensor) -> Tensor:
    """The same for one position without a gradient: [B, 1, 3, heads, D] to [3, B, heads, 1, D]."""
    return _turned(heads, factors[:, None, None]).permute(2, 0, 3, 1, 4)


class _Turn(torch.autograd.Function):
    """Keeps nothing of its input: the gradient turns back by the same angles."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(factors)
        query, key, value = _turned(heads, factors).permute(2, 0, 3, 1, 4)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [factors] = ctx.saved_tensors
        joined = torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2)
        return _turned(joined, factors * factors.new_tensor([1.0, -1.0])), None


def _turned(x: Tensor, factors: Tensor) -> Tensor:
    """Turn each pair of channels of [B, n, 3, heads, D]; a last one without a partner stays."""
    paired = factors.shape[-2] * 2
    if paired < x.shape[-1]:
        return torch.cat((_turned(x[..., :paired], factors), x[..., paired:]), dim=-1)
    pairs = x.to(factors.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which makes one loop of this, but not of complex numbers
        (first, second), (cosine, sine) = pairs.unbind(-1), factors.unbind(-1)
        turned = torch.stack(
            (first * cosine - second * sine, second * cosine + first * sine), dim=-1
        )
    else:
        pairs = pairs.contiguous()
        product = torch.view_as_complex(pairs) * torch.view_as_complex(factors.contiguous())
        turned = torch.view_as_real(product)
    return turned.flatten(-2).to(x.dtype)
