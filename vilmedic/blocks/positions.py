"""Position encodings of report and image tokens: rotary, learned along two axes, token shift."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BASE = 10000.0
FAR_FROM_TEXT = 8192.0  # the text position of every image token
FAR_FROM_IMAGE = -10.0  # the row and column of every text token; the image spans -1 to 1
MOST_TURNS = 5.0  # half turns of the fastest image frequency, a unit of the image


def rotary_angles(text_len: int, side: int, dim_head: int) -> Tensor:
    """Return the rotation angles of the channel pairs of a head at each position.

    A third of the head turns with the text position (RoFormer, arXiv:2104.09864), a third with the
    image row and a third with the image column, both in -1 to 1. Each angle is repeated for the
    two channels of its pair; the remaining channels do not turn.

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
    """Return the angles as complex factors of whole heads.

    Args:
        angles: [n, R], each angle twice.
        dim_head: channels of a head, D.

    Returns:
        Cosine and sine of each pair of channels, [n, D // 2, 2].
    """
    angles = functional.pad(angles[:, ::2], (0, dim_head // 2 - angles.shape[-1] // 2))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def turn(heads: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries, keys and values by the angles of their positions, and split them.

    Args:
        heads: of each position queries, keys and values of all heads, [B, n, 3, heads, D].
        factors: the result of `rotation` for the n positions; sets the precision.

    Returns:
        Queries, keys and values like the input, each [B, heads, n, D].
    """
    query, key, value = _Turn.apply(heads, factors[:, None, None])
    return query, key, value


def turn_one(heads: Tensor, factors: Tensor) -> Tensor:
    """The same for one position without a gradient: [B, 1, 3, heads, D] to [3, B, heads, 1, D]."""
    return _turned(heads, factors[:, None, None]).permute(2, 0, 3, 1, 4)


class AxialPositions(nn.Module):
    """Position embeddings of a square grid, with the names and shapes of dalle-pytorch's.

    Args:
        dim: width.
        side: positions along a side.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        shapes = ((1, side, 1, dim), (1, 1, side, dim))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, places: Tensor) -> Tensor:
        """Embed grid positions, int64 [n], in rows from the top, as vectors [n, dim]."""
        rows, columns = self.weights[0][0, :, 0], self.weights[1][0, 0]
        return rows[places // self.side] + columns[places % self.side]


class TokenShift:
    """Replaces half the channels of a text position, and two quarters of an image position.

    A text position takes its first half from the position before it. An image position takes its
    first quarter from the one above and its second quarter from the one to its left. Where there
    is none, the channels are zero.

    Args:
        text_len: text positions, the begin token included.
        side: image positions along a side.
    """

    def __init__(self, text_len: int, side: int) -> None:
        self.text_len, self.side = text_len, side

    def __call__(self, x: Tensor) -> Tensor:
        """Shift a sequence from its start, [B, n, d]: all of the text and any part of the image."""
        shifted: Tensor = _Shift.apply(x, self.text_len, self.side)
        return shifted

    def sources(self) -> Tensor:
        """Return the positions that the first and second quarter come from: int64 [2, n].

        n is the length of a whole sequence; the index n stands for the row of zeros behind it. The
        entries of text positions are unused.
        """
        length = self.text_len + self.side**2 - 1  # nothing comes after the last image token
        place = torch.arange(length)
        image = place - self.text_len
        above = torch.where(image >= self.side, place - self.side, length)
        left = torch.where(image % self.side > 0, place - 1, length)
        return torch.stack((above, left))

    @staticmethod
    def one(x: Tensor, memory: Tensor, position: Tensor, sources: Tensor) -> Tensor:
        """Shift one image position, given those before it.

        Args:
            x: the position, [B, 1, d]; its first half is written to the memory.
            memory: the first half of all positions and a row of zeros, [B, n + 1, d / 2].
            position: its number, int64 [1].
            sources: the result of `sources` for this position: [2].
        """
        half = memory.shape[-1]
        memory.index_copy_(1, position, x[..., :half])
        found = memory.index_select(1, sources)
        above, left = found[:, :1, : half // 2], found[:, 1:, half // 2 :]
        return torch.cat((above, left, x[..., half:]), dim=-1)


class _Turn(torch.autograd.Function):
    """Saves nothing for backward: the gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(factors)
        query, key, value = _turned(heads, factors).permute(2, 0, 3, 1, 4)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [factors] = ctx.saved_tensors
        joined = torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2)
        cosine, sine = factors.unbind(-1)
        return _turned(joined, torch.stack((cosine, -sine), dim=-1)), None


def _turned(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate each channel pair of [B, n, 3, heads, D]; an odd last channel stays."""
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


class _Shift(torch.autograd.Function):
    """Shift by one copy per direction, where slicing and concatenating would need several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text_len: int, side: int) -> Tensor:
        ctx.text_len, ctx.side = text_len, side
        shifted = x.clone()
        for target, source in _moves(shifted, x, text_len, side):
            target.copy_(source)
        return shifted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [gradient] = gradients
        moved = gradient.clone()
        # The gradient goes back from target to source.
        for target, source in _moves(moved, gradient, ctx.text_len, ctx.side, back=True):
            target.copy_(source)
        return moved, None, None


def _moves(
    to: Tensor, of: Tensor, text_len: int, side: int, *, back: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of slices: parts of `to`, and the part of `of` that is written there.

    Parts of `to` that get nothing are zero.
    """
    quarter, zero = to.shape[-1] // 4, of.new_zeros(())
    text = slice(0, min(text_len, to.shape[1]))
    image = slice(text_len, to.shape[1])
    for place, channels, distance in (
        (text, slice(2 * quarter), 1),
        (image, slice(quarter), side),
        (image, slice(quarter, 2 * quarter), 1),
    ):
        target, source = to[:, place, channels], of[:, place, channels]
        length = target.shape[1]
        late, early = slice(distance, None), slice(max(length - distance, 0))
        if back:
            yield target[:, early], source[:, late]
            yield target[:, early.stop :], zero
        else:
            yield target[:, late], source[:, early]
            yield target[:, :distance], zero
    # The first column has no left neighbour, so the last one passes nothing on.
    column = slice(text_len + (side - 1 if back else 0), None, side)
    yield to[:, column, quarter : 2 * quarter], zero
