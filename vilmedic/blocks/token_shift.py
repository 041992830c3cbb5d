"""Token shift: channels of a position that come from the positions before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


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
        """Where each position finds its first and its second quarter: int64 [2, n].

        n is the length of a whole sequence; a source n stands for the row of zeros behind it. The
        rows of the text say nothing.
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
            sources: what `sources` gives, for this position: [2].
        """
        half = memory.shape[-1]
        memory.index_copy_(1, position, x[..., :half])
        found = memory.index_select(1, sources)
        above, left = found[:, :1, : half // 2], found[:, 1:, half // 2 :]
        return torch.cat((above, left, x[..., half:]), dim=-1)


class _Shift(torch.autograd.Function):
    """One copy in either direction, where slices and concatenations would take several."""

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
        # The other way round: what went from source to target comes back.
        for target, source in _moves(moved, gradient, ctx.text_len, ctx.side, back=True):
            target.copy_(source)
        return moved, None, None


def _moves(
    to: Tensor, of: Tensor, text_len: int, side: int, *, back: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """What goes where: parts of `to`, each with the part of `of` that is written there.

    The parts of `to` that nothing reaches are zero.
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
    # Nothing lies to the left of the first column, so nothing came from the last one.
    column = slice(text_len + (side - 1 if back else 0), None, side)
    yield to[:, column, quarter : 2 * quarter], zero
