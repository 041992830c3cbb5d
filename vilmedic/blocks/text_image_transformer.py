"""Causal transformer over report tokens and the image tokens that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.blocks.linear import Linear, linear_of_few, product_in_float32
from vilmedic.blocks.positions import TokenShift, rotary_angles, rotation, turn, turn_one
from vilmedic.blocks.repeated import checkpoint_blocks

AttentionType = Literal["full", "axial_row", "axial_col"]


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
            again for the gradient; see `checkpoint_blocks`.
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
        shift = TokenShift(text_len, side) if shift_tokens else None
        layers = []
        for number in range(1, depth + 1):
            kind = attn_types[(number - 1) % len(attn_types)]
            attention = CausalAttention(dim, heads, dim_head, attn_dropout, kind)
            feed_forward = FeedForward(dim, ff_dropout)
            around = (3, 2) if shift_tokens else (1, 0)
            branches = (
                Branch(dim, number, inner, shift, nested)
                for inner, nested in zip((attention, feed_forward), around, strict=True)
            )
            layers.append(TransformerLayer(number - 1, *branches))
        self.layers = _Stack(layers)
        angles = rotary_angles(text_len, side, dim_head) if rotary_emb else None
        self.register_buffer("pos_emb", angles)
        self.pos_emb: Tensor | None
        for kind in sorted(set(attn_types) - {"full"}):
            self.register_buffer(f"{kind}_mask", self._axial_mask(kind), persistent=False)
        if activation_checkpointing:
            checkpoint_blocks(self._layers())

    def forward(self, x: Tensor, cache: TransformerCache | None = None) -> Tensor:
        """Run a sequence from its start.

        Args:
            x: embedded tokens, all of the text and any part of the image, [B, n, dim].
            cache: filled with the data that later positions need, if given.

        Returns:
            [B, n, dim].
        """
        length = x.shape[1]
        factors = self._factors(slice(length))
        masks = {kind: mask[:length, :length] for kind, mask in self._masks().items()}
        for layer in self._layers():
            x = layer(x, factors, masks, cache)
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
            end = int(position) + 1  # cheap to read here, unlike attending to the rest
        else:
            masks["full"] = cache.places <= position
        # As numbers to add: attention would convert booleans in every layer.
        added = {
            kind: cache.seen.new_zeros(1, end).masked_fill_(~mask[:, :end], -torch.inf)
            for kind, mask in masks.items()
        }
        sources = cache.sources.index_select(1, position)[:, 0]
        for number, layer in enumerate(self._layers()):
            for half, branch in enumerate(layer):
                inner, normed = branch.inner, branch.normalise(x)
                if branch.shift is not None:
                    memory = cache.shifted[2 * number + half]
                    normed = branch.shift.one(normed, memory, position, sources)
                if isinstance(inner, CausalAttention):
                    projected = inner.project_one(normed, factors)
                    seen = cache.store(number, position, projected[1:])
                    keys, values = (some[:, :, :end] for some in seen)
                    result = inner.attend_one(projected[0], keys, values, added.get(inner.kind))
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

    def _layers(self) -> Any:
        """The layers in order."""
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


class TransformerLayer(nn.Sequential):
    """One layer, which is called as a whole: a branch of attention, then a feed-forward one.

    Args:
        number: the layer's number, from 0.
        branches: the two of them.
    """

    def __init__(self, number: int, *branches: Branch) -> None:
        super().__init__(*branches)
        self.number = number

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        factors: Tensor | None,
        masks: dict[str, Tensor],
        cache: TransformerCache | None = None,
    ) -> Tensor:
        """The states after the layer, of a sequence from its start.

        Args:
            x: the states before it, [B, n, dim].
            factors: rotation factors of the n positions, if they turn.
            masks: what a position sees in layers of a kind, bool [n, n]; all before it in others.
            cache: filled with the data that later positions need, if given.

        Returns:
            [B, n, dim].
        """
        branch: Any
        for half, branch in enumerate(self):
            inner, normed = branch.inner, branch.normalise(x)
            if branch.shift is not None:
                if cache is not None:
                    cache.fill_shift(2 * self.number + half, normed)
                normed = branch.shift(normed)
            if isinstance(inner, CausalAttention):
                query, key, value = inner.project(normed, factors)
                if cache is not None:
                    cache.fill(self.number, key, value)
                result = inner.attend(query, key, value, masks.get(inner.kind))
            else:
                result = inner(normed)
            x = torch.addcmul(x, result, branch.scale)
        return x


class TransformerCache:
    """Keys, values and shifted channels of all positions, allocated once at their full length.

    Shapes stay constant while a sequence grows, so that a step can be compiled or captured.

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
        # Zeros, not uninitialised: masked values still enter the sum, with weight zero.
        self.seen = torch.zeros(shape, dtype=dtype, device=device)
        self.factors = factors
        self.shifted = like.new_zeros(2 * depth, batch, length + 1, dim // 2)
        self.sources = sources.to(device)
        self.places = torch.arange(length, device=like.device)[None]

    def clear(self) -> None:
        """Reset it for other sequences; all tensors keep their addresses."""
        self.seen.zero_()
        self.shifted.zero_()

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


class Branch(nn.Module):
    """One residual branch: normalise, shift, apply, scale (LayerScale, arXiv:2103.17239).

    Args:
        dim: width.
        number: the layer's number from 1, on which the first scale depends.
        inner: the wrapped module.
        shift: the token shift; None leaves it out.
        depth: how deep published checkpoints nest `inner` below the normalisation.
    """

    def __init__(
        self, dim: int, number: int, inner: nn.Module, shift: TokenShift | None, depth: int
    ) -> None:
        super().__init__()
        first = 0.1 if number <= 18 else 1e-5 if number <= 24 else 1e-6
        self.scale = nn.Parameter(torch.full((1, 1, dim), first))
        self.shift = shift
        self._inner = (inner,)  # a tuple, so that it is not registered under a second name
        for _ in range(depth):
            inner = Nested(inner)
        self.fn = Nested(inner, nn.LayerNorm(dim))

    @property
    def inner(self) -> Any:
        """The wrapped module."""
        return self._inner[0]

    def normalise(self, x: Tensor) -> Tensor:
        """The normalised input, not shifted yet."""
        normed: Tensor = self.fn.norm(x)
        return normed


class CausalAttention(nn.Module):
    """Causal attention whose queries, keys and values are all turned by their positions.

    Args:
        dim: width of the layer.
        heads: number of heads.
        dim_head: channels of a head.
        dropout: of the result.
        kind: which positions an image position sees.
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, dropout: float, kind: AttentionType
    ) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.to_qkv = Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def project(self, x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of positions [B, n, dim], each [B, heads, n, dim_head]."""
        heads = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))
        if factors is not None:
            return turn(heads, factors)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        return query, key, value

    def project_one(self, x: Tensor, factors: Tensor | None) -> Tensor:
        """The same for one position [B, 1, dim] without a gradient, [3, B, heads, 1, dim_head]."""
        heads = linear_of_few(x, self.to_qkv.weight, None).unflatten(-1, (3, self.heads, -1))
        return heads.permute(2, 0, 3, 1, 4) if factors is None else turn_one(heads, factors)

    def attend_one(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The result for one query [B, heads, 1, dim_head], without dropout: [B, 1, dim].

        Without a mask it sees all keys.
        """
        attention = (
            functional.scaled_dot_product_attention if query.device.type == "cpu" else attend_once
        )
        found = attention(query, key, value, mask)
        layer: Any = self.to_out[0]
        return linear_of_few(found.transpose(1, 2).flatten(2), layer.weight, layer.bias)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The result for each query, [B, n, dim]; without a mask, all before it and itself."""
        found = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        result: Tensor = self.to_out(found.transpose(1, 2).flatten(2))
        return result


def attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query on a GPU, by plain products.

    Kernels for many queries assign a head to a single multiprocessor, which then reads all keys
    alone: in float32 they take several times as long. And cuDNN's kernel for 16 bits is not
    deterministic, so that the same draws would give different tokens.

    Args:
        query: [B, heads, 1, D].
        key: [B, heads, n, D].
        value: [B, heads, n, D].
        mask: numbers to add to the scores, [1, n]; None adds nothing.

    Returns:
        [B, heads, 1, D].
    """
    scale = query.shape[-1] ** -0.5
    scores = product_in_float32(query.flatten(0, 1), key.flatten(0, 1).mT)
    scores = scores * scale if mask is None else torch.add(mask, scores, alpha=scale)
    shares = scores.softmax(dim=-1).to(value.dtype)
    return torch.bmm(shares, value.flatten(0, 1)).view_as(query)


class FeedForward(nn.Module):
    """The gated feed-forward part of a layer, four times as wide inside.

    Args:
        dim: width of the layer.
        dropout: of the gated channels.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Linear(dim, 8 * dim), GatedGelu(), nn.Dropout(dropout), Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, dim] to the same."""
        result: Tensor = self.net(x)
        return result

    def one(self, x: Tensor) -> Tensor:
        """The same for one position [B, 1, dim], without dropout and without a gradient."""
        first, last = self.net[0], self.net[3]
        values, gates = linear_of_few(x, first.weight, first.bias).chunk(2, dim=-1)  # type: ignore[arg-type]
        gated = values * functional.gelu(gates)
        return linear_of_few(gated, last.weight, last.bias)  # type: ignore[arg-type]


class GatedGelu(nn.Module):
    """The first half of the channels times the GELU of the second (arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 d] to [..., d]."""
        gated: Tensor = _GatedGelu.apply(x)
        return gated


class Nested(nn.Module):
    """Adds another `fn.` to the name of a module, as in published checkpoints.

    Args:
        fn: the module.
        norm: a normalisation beside it, called `norm`.
    """

    def __init__(self, fn: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        if norm is not None:
            self.norm = norm
        self.fn = fn


class _Stack(nn.Module):
    def __init__(self, layers: list[TransformerLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class _GatedGelu(torch.autograd.Function):
    """Saves only its input; everything inside is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        values, gates = x.chunk(2, dim=-1)
        return values * functional.gelu(gates)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        values, gates = x.chunk(2, dim=-1)
        grad_values = gradients[0] * functional.gelu(gates)
        grad_gates = torch.ops.aten.gelu_backward(gradients[0] * values, gates)
        return torch.cat((grad_values, grad_gates), dim=-1)
