"""Random augmentation of the presets: drawn per image, applied to whole batches.

The augmentation of an image is a function of (seed, epoch, line, view): numbers are drawn on the
CPU, in the order in which torchvision's transforms draw them. Crop and flip are applied when the
image is read, since images of different sizes cannot be batched. The remaining numbers, one row per
image, go with the batch; affine map, colours and blur are applied from them on the device of the
batch. Every operation except the affine map works on integers that float32 holds exactly, and none
uses other images: results depend neither on the batch nor on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from vilmedic.datasets.image_source import crop_square, resize_to
from vilmedic.device import constants, widest_float

Range = tuple[float, float]
Rows = list[float]

_LOG_RATIO = torch.log(torch.tensor([3 / 4, 4 / 3])).tolist()  # aspect ratios of a crop
_LUMA = (0.2989, 0.587, 0.114)
_IDENTITY = (1.0, 1.0, 1.0, 0.0)
"""Factors of brightness, contrast, saturation and hue that leave an image as it is."""
_SEQUENCES = {0: (), 2: (0, 1, 0), 4: (0, 1, 2, 3) * 4}
"""Sequences of colour operations that contain every order of that many kinds."""
_WEIGHT = 2048
"""Sum of the integer weights of a blur."""
_FRACTION = 8
"""Fractions of a grey level that are kept between the two passes of a blur."""
_BLOCK = 32
"""Rows or columns of a blur per matrix product."""


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Ranges of a random affine map, all uniform.

    Args:
        degrees: largest rotation to either side.
        shift: largest shift to either side, as a share of the side of the image.
        scale: smallest and largest scale.
    """

    degrees: float
    shift: float
    scale: Range


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation settings of a preset, in order of application; None skips a step.

    Args:
        crop: side of the square crop; None keeps the size.
        channels: of the images, 1 or 3.
        area: smallest and largest share of the area that is cropped and scaled to `crop`; None
            crops a square of `crop` pixels at a random place.
        flip: swap left and right of half of the images.
        affine: rotation, shift and scale; pixels from outside are black.
        jitter: ranges of the factors of brightness and contrast and, for three channels, of
            saturation and hue; applied in a random order.
        jitter_share: share of the images whose colours change.
        grey_share: share of the images of three channels that become grey.
        blur: smallest and largest standard deviation in pixels of a Gaussian blur.
        blur_share: share of the images that are blurred.
    """

    crop: int | None
    channels: int
    area: Range | None = None
    flip: bool = False
    affine: Affine | None = None
    jitter: tuple[Range, ...] = ()
    jitter_share: float = 1.0
    grey_share: float = 0.0
    blur: Range | None = None
    blur_share: float = 1.0

    @property
    def sizes(self) -> list[int]:
        """Numbers per row for geometry, colours, greyscale and blur."""
        return [
            6 if self.affine else 0,
            len(_SEQUENCES[len(self.jitter)]),
            1 if self.grey_share else 0,
            _radius(self.crop) + 1 if self.blur and self.crop else 0,
        ]

    def cut(self, image: Tensor) -> tuple[Tensor, Rows]:
        """Draw the augmentation of an image, and apply crop and flip.

        Args:
            image: uint8 [C, H, W]; not written to.

        Returns:
            uint8 [C, crop, crop], which may share its memory with `image`, and the numbers for
            `apply`.

        Raises:
            ValueError: the image is smaller than `crop`, and is not scaled.
        """
        if self.area is not None and self.crop is not None:
            top, left, height, width = _part(image.shape[-2], image.shape[-1], self.area)
            image = image[:, top : top + height, left : left + width]
            image = resize_to(image, self.crop, self.crop)
        if self.flip and _happens(0.5):
            image = image.flip(-1)
        row: Rows = []
        if self.affine is not None:
            row += _draw_affine(self.affine, image.shape[-2], image.shape[-1])
        if self.jitter:
            row += self._draw_jitter()
        if self.grey_share:
            row.append(float(_happens(self.grey_share)))
        if self.blur is not None and self.crop is not None:
            row += self._draw_blur(self.blur, _radius(self.crop))
        if self.area is None and self.crop is not None:
            image = crop_square(image, self.crop, random=True)
        return image, row

    def apply(self, images: Tensor, rows: Tensor) -> Tensor:
        """Apply the remaining augmentation to a batch, on its device and without synchronising.

        Args:
            images: uint8 [B, C, H, W], from `cut`.
            rows: float32 [B, N], the numbers of each.

        Returns:
            float32 [B, C, H, W], whole numbers from 0 to 255.
        """
        # Steps not drawn for an image change nothing; they are skipped if the host knows that.
        known = rows.T.tolist() if rows.device.type == "cpu" else None

        def idle(place: int, identity: float) -> bool:
            return known is not None and all(number == identity for number in known[place])

        matrix, factors, grey, weights = rows.split(self.sizes, dim=1)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            values = images.float()
            if self.affine is not None:
                values = _warped(values, matrix)
            start = matrix.shape[1]
            for place, kind in enumerate(_SEQUENCES[len(self.jitter)]):
                if not idle(start + place, _IDENTITY[kind]):
                    values = _CHANGES[kind](values, factors[:, place].view(-1, 1, 1, 1))
            start += factors.shape[1]
            if self.grey_share and not idle(start, 0.0):
                values = torch.where(grey.view(-1, 1, 1, 1) != 0, _luma(values), values)
            start += grey.shape[1]
            if self.blur is not None and not idle(start, _WEIGHT):
                values = _blurred(values, weights)
        return values

    def _draw_jitter(self) -> Rows:
        """A factor for each of `_SEQUENCES`; see `torchvision.transforms.ColorJitter`."""
        sequence = _SEQUENCES[len(self.jitter)]
        row = [_IDENTITY[kind] for kind in sequence]
        if self.jitter_share < 1 and not _happens(self.jitter_share):
            return row
        order = torch.randperm(len(_IDENTITY)).tolist()
        drawn = [_uniform(low, high) for low, high in self.jitter]
        place = -1
        for kind in (kind for kind in order if kind < len(drawn)):
            place = sequence.index(kind, place + 1)
            row[place] = drawn[kind]
        return row

    def _draw_blur(self, sigma: Range, radius: int) -> Rows:
        """Whole-number weights of the middle of a Gaussian kernel and of one side of it."""
        if self.blur_share < 1 and not _happens(self.blur_share):
            return [float(_WEIGHT)] + [0.0] * radius
        low, high = sigma
        drawn = low + (high - low) * torch.rand(()).item()
        heights = [math.exp(-((place / drawn) ** 2) / 2) for place in range(1, radius + 1)]
        share = _WEIGHT / (1 + 2 * sum(heights))
        side = [float(round(share * height)) for height in heights]
        return [_WEIGHT - 2 * sum(side), *side]


def preset_augmentation(preset: str, crop: int | None, channels: int) -> Augmentation:
    """The random part of a preset, which comes after resizing.

    - `convirt`: Zhang et al. 2020 (arXiv:2010.00747), section 3: crop of 0.6 to 1.0 of the area,
      horizontal flip, rotation up to 20 degrees, translation up to 0.1, scale 0.95 to 1.05,
      brightness and contrast 0.6 to 1.4, Gaussian blur with sigma 0.1 to 3.0.
    - `simclr`: Chen et al. 2020 (arXiv:2002.05709), appendix A: crop of 0.08 to 1.0 of the area,
      flip, colour jitter of strength 1, greyscale, blur. On grey images the jitter of hue and
      saturation and the greyscale step, which mean nothing there, are left out.
    - `simclr_xray`: horizontal flip, and a crop at a random place.

    Raises:
        ValueError: the preset crops and there is no `crop`.
    """
    if preset == "simclr_xray":
        return Augmentation(crop=crop, channels=channels, flip=True)
    if crop is None:
        raise ValueError(f"The preset {preset} crops to `crop` pixels, and crop is null.")
    if preset == "convirt":
        return Augmentation(
            crop=crop,
            channels=channels,
            area=(0.6, 1.0),
            flip=True,
            affine=Affine(degrees=20, shift=0.1, scale=(0.95, 1.05)),
            jitter=((0.6, 1.4), (0.6, 1.4)),
            blur=(0.1, 3.0),
        )
    colours: tuple[tuple[float, float], ...] = ((0.2, 1.8), (0.2, 1.8))
    if channels == 3:
        colours = (*colours, (0.2, 1.8), (-0.2, 0.2))
    return Augmentation(
        crop=crop,
        channels=channels,
        area=(0.08, 1.0),
        flip=True,
        jitter=colours,
        jitter_share=0.8,
        grey_share=0.2 if channels == 3 else 0.0,
        blur=(0.1, 2.0),
        blur_share=0.5,
    )


def _radius(crop: int) -> int:
    """Pixels to each side of a blur: the kernel is a tenth of the image as in SimCLR, and odd."""
    return (crop // 10 | 1) // 2


def _uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


def _happens(share: float) -> bool:
    return torch.rand(1).item() < share


def _part(height: int, width: int, share: Range) -> Sequence[int]:
    """Top, left, height and width of a part; see `torchvision.transforms.RandomResizedCrop`."""
    for _ in range(10):
        area = height * width * _uniform(*share)
        ratio = torch.empty(1).uniform_(*_LOG_RATIO).exp_().item()
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            top = int(torch.randint(height - rows + 1, (1,)))
            left = int(torch.randint(width - columns + 1, (1,)))
            return top, left, rows, columns
    rows, columns = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _draw_affine(ranges: Affine, height: int, width: int) -> Rows:
    """Return the source of each pixel; see `torchvision.transforms.RandomAffine`.

    Returns:
        The 2 x 3 matrix from a place in pixels, measured from the middle of the image, to its
        source as a share of half the width and half the height.
    """
    angle = math.radians(_uniform(-ranges.degrees, ranges.degrees))
    right, down = ranges.shift * width, ranges.shift * height
    right, down = round(_uniform(-right, right)), round(_uniform(-down, down))
    scale = _uniform(*ranges.scale)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    across = [cos, sin, -cos * right - sin * down]
    along = [-sin, cos, sin * right - cos * down]
    return [2 / width * one for one in across] + [2 / height * one for one in along]


def _warped(values: Tensor, matrix: Tensor) -> Tensor:
    """Whole numbers [B, C, H, W] after affine maps [B, 6]."""
    count, _, height, width = values.shape
    x, y = constants(_from_the_middle, width, height, like=values)
    of_x, of_y, constant = matrix.view(count, 2, 3, 1).unbind(2)
    places = (of_x * x + constant)[:, :, None, :] + (of_y * y)[:, :, :, None]  # [B, 2, H, W]
    places = places.permute(0, 2, 3, 1)
    return grid_sample(values, places, padding_mode="zeros", align_corners=False).round_()


def _from_the_middle(*sizes: int) -> tuple[Tensor, ...]:
    """Return pixel coordinates along axes of these sizes, measured from the centre."""
    return tuple(torch.arange(size, dtype=torch.float32) - (size - 1) / 2 for size in sizes)


def _luma(values: Tensor) -> Tensor:
    """The brightness of [B, 3, H, W] in whole numbers, [B, 1, H, W]; of one channel itself."""
    if values.shape[1] == 1:
        return values
    red, green, blue = values.split(1, dim=1)
    return (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2]).floor_()


def _brightened(values: Tensor, factor: Tensor) -> Tensor:
    return values.mul_(factor).clamp_(0, 255).floor_()


def _contrasted(values: Tensor, factor: Tensor) -> Tensor:
    grey = _luma(values)
    # integers: the order of the sum makes no difference
    total = grey.sum(-1).sum((1, 2), dtype=widest_float(grey.device))
    mean = (total / grey[0].numel()).float().view(-1, 1, 1, 1)
    return values.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255).floor_()


def _saturated(values: Tensor, factor: Tensor) -> Tensor:
    grey = _luma(values) * (1 - factor)
    return values.mul_(factor).add_(grey).clamp_(0, 255).floor_()


def _hued(values: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of colours [B, 3, H, W] by a share of the colour circle; 0 changes nothing."""
    red, green, blue = values.split(1, dim=1)
    low, high = values.aminmax(dim=1, keepdim=True)
    chroma = high - low
    divisor = chroma.clamp(min=1)  # 0 means no colour
    hue = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    (steps,) = constants(_hue_steps, like=values)
    place = (hue + 6 * shift + steps).remainder(6)
    moved = high - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)
    return torch.where(shift != 0, moved.add_(1e-3).floor_(), values)


_CHANGES = (_brightened, _contrasted, _saturated, _hued)


def _hue_steps() -> tuple[Tensor]:
    """Return the hue offsets of red, green and blue, [3, 1, 1]."""
    return (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1),)


def _blurred(values: Tensor, weights: Tensor) -> Tensor:
    """Whole numbers [B, C, H, W] after a blur with the weights [B, radius + 1] of `_draw_blur`.

    A blur along an axis is a product with a matrix that is zero away from its diagonal; blocks of
    it leave most of the zeros out. All sums are of whole numbers below 2^24, and all factors have
    11 bits: no order of the sums and no shortened format of products changes the result.
    """
    radius = weights.shape[1] - 1
    kernel = torch.cat([weights[:, 1:].flip(1), weights], dim=1) * (_FRACTION / _WEIGHT)
    shifted = pad(kernel, [_BLOCK - 1, _BLOCK - 1]).unfold(1, _BLOCK + 2 * radius, 1)
    band = shifted.flip(1)[:, None, None]  # [B, 1, 1, block, window]
    rows = (band @ _windows(values, radius, 2).transpose(-1, -2)).flatten(2, 3)
    rows = rows[:, :, : values.shape[2]].round_()
    columns = _windows(rows, radius, 3).transpose(2, 3) @ (band / _FRACTION**2).transpose(-1, -2)
    return columns.transpose(2, 3).flatten(3, 4)[..., : values.shape[3]].round_()


def _windows(values: Tensor, radius: int, axis: int) -> Tensor:
    """Overlapping windows of [B, C, H, W] along an axis, the mirrored border included.

    Returns:
        [B, C, number of windows, W, window] for rows, [B, C, H, number of windows, window] for
        columns.
    """
    rest = -values.shape[axis] % _BLOCK
    before = [] if axis == 3 else [0, 0]  # padding lists the last axis first
    values = pad(values, [*before, radius, radius, *[0, 0][len(before) :]], mode="reflect")
    if rest:
        values = pad(values, [*before, 0, rest])
    return values.unfold(axis, _BLOCK + 2 * radius, _BLOCK)
