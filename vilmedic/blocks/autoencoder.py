"""Convolutions, codebook and pixel scaling of the discrete VAE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vilmedic.device import block_numbers
from vilmedic.errors import ArgumentError

BLOCK = 2**23
"""Logits per block on a CPU: 32 MiB of float32, several times that while one is computed.

From this size on, the C library maps memory for each tensor and returns it at once. Smaller tensors
come from its heap, where the results that are kept fragment the memory of freed blocks.
"""


def make_encoder(
    channels: int, hidden: int, layers: int, blocks: int, tokens: int
) -> nn.Sequential:
    """Image [B, C, H, W] to logits [B, K, h, w]."""
    parts: list[nn.Module] = []
    for number in range(layers):
        halve = nn.Conv2d(hidden if number else channels, hidden, 4, stride=2, padding=1)
        parts.append(nn.Sequential(halve, nn.ReLU(inplace=True)))
    parts += [ResidualBlock(hidden) for _ in range(blocks)]
    return nn.Sequential(*parts, nn.Conv2d(hidden, tokens, 1))


def make_decoder(channels: int, hidden: int, layers: int, blocks: int, width: int) -> nn.Sequential:
    """Code vectors [B, D, h, w] to the image [B, C, H, W]."""
    parts: list[nn.Module] = []
    if blocks:
        parts = [nn.Conv2d(width, hidden, 1), *(ResidualBlock(hidden) for _ in range(blocks))]
    for number in range(layers):
        first = number == 0 and not blocks
        double = nn.ConvTranspose2d(width if first else hidden, hidden, 4, stride=2, padding=1)
        parts.append(nn.Sequential(double, nn.ReLU(inplace=True)))
    return nn.Sequential(*parts, nn.Conv2d(hidden, channels, 1))


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
    """Draw a code for each position by Gumbel softmax and look up its vector.

    With q the softmax of the logits and g Gumbel noise, the weights of the K codes are
    softmax((logits + g) / temperature) (Jang et al. 2017, arXiv:1611.01144, equation 2). This is
    computed for one block of positions at a time, and again in the backward pass with the same
    noise: the [P, K] weights, by far the largest tensors of the model, never exist as a whole.

    Args:
        features: input of the linear map to the logits, [P, H].
        weight: of that map, [K, H].
        bias: of that map, [K].
        vectors: the vector of each code, [K, D].
        temperature: of the softmax; towards 0 it becomes a choice.
        hard: choose the code with the largest weight, with the gradient of the softmax
            (straight-through).
        reinmax: with `hard`, the gradient of second order (Liu et al. 2023, arXiv:2304.08612).
        divergence: compute the divergence as well.
        noise: g, instead of drawing it, [P, K].

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
        # Last, so that the second computation in the backward pass ends before it.
        return spread, shares.to(vectors.dtype) @ vectors

    found, spreads = [], []
    parts = list(_blocks(features, weight))
    # Torch cannot repeat the noise of an Apple GPU for a second pass: there, everything is kept.
    again = len(parts) > 1 and torch.is_grad_enabled() and features.device.type != "mps"
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
    """Return the code with the largest logit at each position: int64 [P]; arguments as above."""
    parts = _blocks(features, weight)
    return torch.cat([functional.linear(rows, weight, bias).argmax(dim=1) for _, rows in parts])


def at_least_float32(values: Tensor) -> Tensor:
    """Convert values of reduced precision to float32, and leave others."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class ResidualBlock(nn.Module):
    """Residual block: three convolutions and a shortcut.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps [B, C, h, w] to the same shape."""
        refined: Tensor = self.net(images)
        return refined + images


class PixelScale(nn.Module):
    """Pixel scaling of a network whose input and output are pixels in 0..1.

    Args:
        given: means and standard deviations of the channels; None leaves pixels unchanged.
            Numbers beyond the number of channels are ignored.
        channels: number of channels.

    Raises:
        ConfigError: there are too few numbers, or a standard deviation is not positive.
    """

    def __init__(self, given: Sequence[list[float]] | None, channels: int) -> None:
        super().__init__()
        self.mean_and_std = None
        if given is None:
            return
        if len(given) != 2 or any(len(values) < channels for values in given) or min(given[1]) <= 0:
            raise ArgumentError(
                {
                    "normalization": f"given {given}, allowed: two lists of {channels} numbers, "
                    "the means and the (positive) standard deviations of the channels, or null."
                }
            )
        self.mean_and_std = given[0][:channels], given[1][:channels]
        self.register_buffer("planes", torch.tensor(self.mean_and_std), persistent=False)
        self.planes: Tensor

    def normalize(self, images: Tensor) -> Tensor:
        """Scale pixels in 0..1 to the input of the network, [..., C, H, W]."""
        if self.mean_and_std is None:
            return images
        mean, std = self.planes.to(images.dtype)[..., None, None]
        return (images - mean) / std

    def restore(self, images: Tensor) -> Tensor:
        """Scale the output of the network to pixels, clipped to 0..1: [..., C, H, W]."""
        if self.mean_and_std is not None:
            mean, std = self.planes.to(images.dtype)[..., None, None]
            images = images * std + mean
        return images.clamp(0, 1)


def _blocks(features: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of rows, each with the index of its first row."""
    size = max(1, block_numbers(features.device, BLOCK) // len(weight))
    for start in range(0, len(features), size):
        yield start, features[start : start + size]


def _straight_through(soft: Tensor, logits: Tensor, temperature: float, reinmax: bool) -> Tensor:
    """One-hot vector of the largest share, with a gradient: [P, K]."""
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    if not reinmax:
        return hard - soft.detach() + soft
    first = logits.softmax(dim=1)
    second = (hard + (logits / temperature).softmax(dim=1)) / 2
    second = ((second.clamp(min=1e-20).log() - logits).detach() + logits).softmax(dim=1)
    slope = 2 * second - 0.5 * first
    return slope - slope.detach() + hard
