"""The codebook of a discrete VAE, looked up softly so that gradients pass."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

BLOCK = 2**23
"""Logits that exist at a time: 32 MiB of float32, several times over while a block is computed.

From this size on the C library maps memory for each tensor and gives it back at once. Smaller ones
it takes from its heap, where what is kept of each block lies between the holes of the blocks.
"""


def relaxed_lookup(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    vectors: Tensor,
    *,
    temperature: float,
    hard: bool = False,
    reinmax: bool = False,
    divergence: bool = False,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a code for each position by Gumbel softmax and look its vector up.

    With q the softmax of the logits and g Gumbel noise, the weights of the K codes are
    softmax((logits + g) / temperature) (Jang et al. 2017, arXiv:1611.01144, equation 2). All of it
    is computed for a block of positions at a time and once more in the backward pass with the same
    noise: the [P, K] weights, the largest tensors of the model by far, never exist as a whole.

    Args:
        features: what the logits are a linear map of, [P, H].
        weight: of that map, [K, H].
        bias: of that map, [K].
        vectors: the vector of each code, [K, D].
        temperature: of the softmax; towards 0 it becomes a choice.
        hard: choose the code with the largest weight, with the gradient of the softmax
            (straight-through).
        reinmax: with `hard`, the gradient of second order (Liu et al. 2023, arXiv:2304.08612).
        divergence: compute the divergence as well.
        noise: g to use instead of drawing it, [P, K].

    Returns:
        The vectors [P, D], and the divergence KL(q || uniform) summed over positions, in nats; 0
        when it was not asked for.
    """

    def look_up(
        rows: Tensor, weight: Tensor, bias: Tensor, vectors: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = at_least_float32(functional.linear(rows, weight, bias))
        spread = logits.new_zeros(())
        if divergence:
            log_q = functional.log_softmax(logits, dim=1)
            spread = (log_q.exp() * (log_q + math.log(log_q.shape[1]))).sum()
        if given is None:
            given = -torch.empty_like(logits).exponential_().log()
        shares = functional.softmax((logits + given) / temperature, dim=1)
        if hard:
            shares = _straight_through(shares, logits, temperature, reinmax)
        # Last, so that the second run in the backward pass ends before it.
        return spread, shares.to(vectors.dtype) @ vectors

    found, spreads = [], []
    parts = list(_blocks(features, weight))
    again = len(parts) > 1 and torch.is_grad_enabled()
    for start, rows in parts:
        given = None if noise is None else noise[start : start + len(rows)]
        arguments = (rows, weight, bias, vectors, given)
        spread, vector = (
            checkpoint(look_up, *arguments, use_reentrant=False) if again else look_up(*arguments)
        )
        found.append(vector)
        spreads.append(spread)
    return torch.cat(found), torch.stack(spreads).sum()


def likeliest_codes(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The code with the largest logit at each position: int64 [P]; arguments as above."""
    parts = _blocks(features, weight)
    return torch.cat([functional.linear(rows, weight, bias).argmax(dim=1) for _, rows in parts])


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32 where they have reduced precision, and as they are otherwise."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _blocks(features: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Groups of rows with at most `BLOCK` logits, each with the place of its first row."""
    size = max(1, BLOCK // len(weight))
    for start in range(0, len(features), size):
        yield start, features[start : start + size]


def _straight_through(soft: Tensor, logits: Tensor, temperature: float, reinmax: bool) -> Tensor:
    """The largest share as 1 and the others as 0, with a gradient: [P, K]."""
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    if not reinmax:
        return hard - soft.detach() + soft
    first = logits.softmax(dim=1)
    second = (hard + (logits / temperature).softmax(dim=1)) / 2
    second = ((second.clamp(min=1e-20).log() - logits).detach() + logits).softmax(dim=1)
    slope = 2 * second - 0.5 * first
    return slope - slope.detach() + hard
