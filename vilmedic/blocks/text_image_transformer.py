"""The causal transformer over a report and the image tokens that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vilmedic.blocks.rotary import rotary_angles, rotation
from vilmedic.blocks.token_shift import TokenShift
from vilmedic.blocks.transformer_cache import TransformerCache
from vilmedic.blocks.transformer_parts import Attention, AttentionType, Branch, FeedForward


class _Stack(nn.Module):
    def __init__(self, layers: list[nn.ModuleList]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TextImageTransformer(nn.Module):
    """Pre-norm layers of attention and gated feed-forward, each position seeing those before it.

    Parameters have the names and shapes of dalle-pytorch's `Transformer`. Image positions of axial
    layers see the text, and of the image their own row or column.

    Args:
        dim: width.
        depth: number of layers.
        heads: attention heads.
        dim_head: channels of a head.
        text_len: text positions, the begin token included.
        side: image positions along a side.
        attn_types: the attention of the layers, repeated as often as needed.
        attn_dropout: dropout of what attention gives.
        ff_dropout: dropout inside the feed-forward part.
        rotary_emb: turn queries, keys and values by their positions.
        shift_tokens: shift channels between positions.
        activation_checkpointing: in training, keep the inputs of layers only and compute the rest
            again for the gradient.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        text_len: int,
        side: int,
        attn_types: Sequence[AttentionType] = ("full",),
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        rotary_emb: bool = True,
        shift_tokens: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.dim_head = dim, heads, dim_head
        self.text_len, self.side = text_len, side
        self.length = text_len - 1 + side**2
        self.activation_checkpointing = activation_checkpointing
        shift = TokenShift(text_len, side) if shift_tokens else None
        layers = []
        for number in range(1, depth + 1):
            kind = attn_types[(number - 1) % len(attn_types)]
            attention = Attention(dim, heads, dim_head, attn_dropout, kind)
            feed_forward = FeedForward(dim, ff_dropout)
            around = (3, 2) if shift_tokens else (1, 0)
            branches = (
                Branch(dim, number, inner, shift, nested)
                for inner, nested in zip((attention, feed_forward), around, strict=True)
            )
            layers.append(nn.ModuleList(branches))
        self.layers = _Stack(layers)
        angles = rotary_angles(text_len, side, dim_head) if rotary_emb else None
        self.register_buffer("pos_emb", angles)
        self.pos_emb: Tensor | None
        for kind in sorted(set(attn_types) - {"full"}):
            self.register_buffer(f"{kind}_mask", self._axial_mask(kind), persistent=False)

    def forward(self, x: Tensor, cache: TransformerCache | None = None) -> Tensor:
        """The states of a sequence from its start.

        Args:
            x: embedded tokens, all of the text and any part of the image, [B, n, dim].
            cache: is filled with what later positions need, if given.

        Returns:
            [B, n, dim].
        """
        length = x.shape[1]
        factors = self._factors(slice(length))
        masks = {kind: mask[:length, :length] for kind, mask in self._masks().items()}
        for number, layer in enumerate(self._layers()):
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(
                    self._layer, layer, number, x, factors, masks, None, use_reentrant=False
                )
            else:
                x = self._layer(layer, number, x, factors, masks, cache)
        return x

    def step(self, x: Tensor, position: Tensor, cache: TransformerCache) -> Tensor:
        """The state of one image position, given the cache of all before it.

        Args:
            x: the embedded token, [B, 1, dim].
            position: its number in the sequence, int64 [1].
            cache: what `forward` and earlier steps left; this position is added.

        Returns:
            [B, 1, dim].
        """
        factors = None if cache.factors is None else cache.factors.index_select(0, position)
        masks = {kind: mask.index_select(0, position) for kind, mask in self._masks().items()}
        end = self.length
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            end = int(position) + 1  # reading it costs nothing here, attending to the rest does
        else:
            masks["full"] = cache.places <= position
        # As numbers to add: attention would make them of truth values in every layer.
        added = {
            kind: x.new_zeros(1, end).masked_fill_(~mask[:, :end], -torch.inf)
            for kind, mask in masks.items()
        }
        sources = cache.sources.index_select(1, position)[:, 0]
        for number, layer in enumerate(self._layers()):
            for half, branch in enumerate(layer):
                inner, normed = branch.inner, branch.normalise(x)
                if branch.shift is not None:
                    memory = cache.shifted[2 * number + half]
                    normed = branch.shift.one(normed, memory, position, sources)
                if isinstance(inner, Attention):
                    projected = inner.project_one(normed, factors)
                    seen = cache.store(number, position, projected[1:])
                    keys, values = (some[:, :, :end] for some in seen)
                    mask = added.get(inner.kind)
                    mask = None if mask is None else mask.to(keys.dtype)
                    result = inner.attend_one(projected[0], keys, values, mask)
                else:
                    result = inner.one(normed)
                x = torch.addcmul(x, result, branch.scale)
        return x

    def make_cache(self, batch: int) -> TransformerCache:
        """An empty cache for sequences of full length, in the dtype of the weights."""
        layers = self._layers()
        return TransformerCache(
            depth=len(layers),
            batch=batch,
            heads=self.heads,
            length=self.length,
            dim_head=self.dim_head,
            dim=self.dim,
            sources=TokenShift(self.text_len, self.side).sources(),
            factors=self._factors(slice(self.length)),
            like=layers[0][0].scale,
        )

    def _layer(
        self,
        layer: Any,
        number: int,
        x: Tensor,
        factors: Tensor | None,
        masks: dict[str, Tensor],
        cache: TransformerCache | None,
    ) -> Tensor:
        for half, branch in enumerate(layer):
            inner, normed = branch.inner, branch.normalise(x)
            if branch.shift is not None:
                if cache is not None:
                    cache.fill_shift(2 * number + half, normed)
                normed = branch.shift(normed)
            if isinstance(inner, Attention):
                query, key, value = inner.project(normed, factors)
                if cache is not None:
                    cache.fill(number, key, value)
                result = inner.attend(query, key, value, masks.get(inner.kind))
            else:
                result = inner(normed)
            x = torch.addcmul(x, result, branch.scale)
        return x

    def _layers(self) -> Any:
        """The layers, each a pair of branches."""
        return self.layers.layers

    def _factors(self, positions: slice) -> Tensor | None:
        """Rotation factors of n positions, [n, D // 2, 2]."""
        if self.pos_emb is None:
            return None
        return rotation(self.pos_emb[0, positions], self.dim_head)

    def _masks(self) -> dict[str, Tensor]:
        return {
            kind: getattr(self, f"{kind}_mask")
            for kind in ("axial_row", "axial_col")
            if hasattr(self, f"{kind}_mask")
        }

    def _axial_mask(self, kind: str) -> Tensor:
        """Which positions (columns) each position (row) sees, bool [length, length]."""
        place = torch.arange(self.length)
        image = place - self.text_len
        line = image // self.side if kind == "axial_row" else image % self.side
        text = place < self.text_len
        same_line = (line[:, None] == line) & ~text[:, None] & ~text
        return (place[:, None] >= place) & (text | same_line)
