"""Token shift: channels of a position that come from the positions before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
        quarter = x.shape[-1] // 4
        text, image = x[:, : self.text_len], x[:, self.text_len :]
        before = functional.pad(text[:, :-1, : 2 * quarter], (0, 0, 1, 0))
        shifted = torch.cat((before, text[..., 2 * quarter :]), dim=-1)
        length = image.shape[1]
        if not length:
            return shifted
        inside = max(length - self.side, 0)
        above = functional.pad(image[:, :inside, :quarter], (0, 0, length - inside, 0))
        left = functional.pad(image[:, :-1, quarter : 2 * quarter], (0, 0, 1, 0))
        first = torch.arange(length, device=x.device) % self.side == 0
        left = left.masked_fill(first[:, None], 0.0)
        image = torch.cat((above, left, image[..., 2 * quarter :]), dim=-1)
        return torch.cat((shifted, image), dim=1)

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
            sources: what `sources` gives, for this position: [2, 1].
        """
        half = memory.shape[-1]
        memory.index_copy_(1, position, x[..., :half])
        above = memory.index_select(1, sources[0])[..., : half // 2]
        left = memory.index_select(1, sources[1])[..., half // 2 :]
        return torch.cat((above, left, x[..., half:]), dim=-1)
