"""The convolutions of a discrete VAE, with the parameter names of dalle-pytorch's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vilmedic.errors import ConfigError


class ResidualBlock(nn.Module):
    """Three convolutions beside a shortcut.

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


class PixelScale:
    """The scale of pixels inside a network that is given, and gives, pixels in 0..1.

    Args:
        given: the means and the standard deviations of the channels; None leaves pixels as they
            are. Numbers beyond those of the channels are left out.
        channels: number of channels.

    Raises:
        ConfigError: there are too few numbers, or a standard deviation is not positive.
    """

    def __init__(self, given: Sequence[list[float]] | None, channels: int) -> None:
        self.mean_and_std = None
        if given is None:
            return
        if len(given) != 2 or any(len(values) < channels for values in given) or min(given[1]) <= 0:
            raise ConfigError(
                f"model.normalization: given {given}, allowed: two lists of {channels} numbers, "
                "the means and the (positive) standard deviations of the channels, or null."
            )
        self.mean_and_std = given[0][:channels], given[1][:channels]

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels in 0..1 as the network takes them, [..., C, H, W]."""
        if self.mean_and_std is None:
            return images
        mean, std = (images.new_tensor(values)[:, None, None] for values in self.mean_and_std)
        return (images - mean) / std

    def restore(self, images: Tensor) -> Tensor:
        """What the network gives as pixels, cut to 0..1: [..., C, H, W]."""
        if self.mean_and_std is not None:
            mean, std = (images.new_tensor(values)[:, None, None] for values in self.mean_and_std)
            images = images * std + mean
        return images.clamp(0, 1)
