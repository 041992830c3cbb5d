"""The parts of a layer: attention and feed-forward, each on a residual branch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.blocks.linear import Linear, linear_of_few
from vilmedic.blocks.rotary import turn, turn_one
from vilmedic.blocks.token_shift import TokenShift

AttentionType = Literal["full", "axial_row", "axial_col"]


class Nested(nn.Module):
    """Gives a module one more `fn.` in its name, as published checkpoints have it.

    Args:
        fn: the module.
        norm: a normalisation beside it, called `norm`.
    """

    def __init__(self, fn: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        if norm is not None:
            self.norm = norm
        self.fn = fn


class _GatedGelu(torch.autograd.Function):
    """Keeps its input alone; what lies between is computed again for the gradient."""

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


class GatedGelu(nn.Module):
    """The first half of the channels times the GELU of the second (arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 d] to [..., d]."""
        gated: Tensor = _GatedGelu.apply(x)
        return gated


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


class Attention(nn.Module):
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
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        layer: Any = self.to_out[0]
        return linear_of_few(found.transpose(1, 2).flatten(2), layer.weight, layer.bias)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The result for each query, [B, n, dim]; without a mask, all before it and itself."""
        found = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        result: Tensor = self.to_out(found.transpose(1, 2).flatten(2))
        return result


class Branch(nn.Module):
    """One residual branch: normalise, shift, apply, scale (LayerScale, arXiv:2103.17239).

    Args:
        dim: width.
        number: the layer's number from 1, on which the first scale depends.
        inner: what is applied.
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
        """What is applied."""
        return self._inner[0]

    def normalise(self, x: Tensor) -> Tensor:
        """The normalised input, not shifted yet."""
        normed: Tensor = self.fn.norm(x)
        return normed
