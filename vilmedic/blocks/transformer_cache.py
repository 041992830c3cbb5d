"""What a transformer remembers of the positions that it has seen."""

from __future__ import annotations

import torch
from torch import Tensor


class TransformerCache:
    """Keys, values and shifted channels of all positions, allocated once at their full length.

    Shapes never change while a sequence grows, so that a step can be compiled or captured.

    Args:
        depth: number of layers.
        batch: sequences.
        heads: attention heads.
        length: positions of a whole sequence, n.
        dim_head: channels of a head.
        dim: width of the layers.
        sources: where the token shift finds its channels, int64 [2, n].
        factors: rotation factors of all positions, if they turn.
        like: a tensor of the dtype and device to use; keys and values are in that of autocast.
    """

    def __init__(
        self,
        *,
        depth: int,
        batch: int,
        heads: int,
        length: int,
        dim_head: int,
        dim: int,
        sources: Tensor,
        factors: Tensor | None,
        like: Tensor,
    ) -> None:
        device, dtype = like.device, like.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = (depth, 2, batch, heads, length, dim_head)
        # Zeros, not left unset: what is masked still takes part in the sum, with weight zero.
        self.seen = torch.zeros(shape, dtype=dtype, device=device)
        self.factors = factors
        self.shifted = like.new_zeros(2 * depth, batch, length + 1, dim // 2)
        self.sources = sources.to(device)
        self.places = torch.arange(length, device=like.device)[None]

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values [B, heads, n, D] of a sequence from its start."""
        self.seen[layer, 0, :, :, : key.shape[2]] = key
        self.seen[layer, 1, :, :, : key.shape[2]] = value

    def fill_shift(self, branch: int, x: Tensor) -> None:
        """Keep the channels of a sequence from its start, [B, n, d], that later ones take."""
        self.shifted[branch, :, : x.shape[1]] = x[..., : self.shifted.shape[-1]]

    def store(self, layer: int, position: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Add the key and the value of a position, [2, B, heads, 1, D]; returns those of all."""
        seen = self.seen[layer]
        seen.index_copy_(3, position, pair.to(seen.dtype))
        return seen[0], seen[1]
