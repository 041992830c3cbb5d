"""From decoded images to what a model takes: sizes, transforms, crop and normalisation.

Transforms are torchvision's own by name, or published sets of them as presets. All work on uint8
tensors [C, H, W] on the CPU.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from vilmedic.datasets.aligned import seeded, stable_seed
from vilmedic.datasets.decode import Color
from vilmedic.device import constants
from vilmedic.errors import DataError, nearest

logger = logging.getLogger(__name__)

Preset = Literal["resize_crop", "center_crop", "convirt", "simclr", "simclr_xray"]
_BILINEAR = v2.InterpolationMode.BILINEAR


class Pixels:
    """What a data set does to an image between decoding and the model.

    Args:
        training: whether the random transforms of training are drawn.
        resize: see `ImageDataset`, as for all that follow.
        crop: see `ImageDataset`.
        color: see `ImageDataset`.
        views: see `ImageDataset`.
        preset: see `ImageDataset`.
        transforms: see `ImageDataset`.
        eval_transforms: see `ImageDataset`.
        mean: see `ImageDataset`.
        std: see `ImageDataset`.
        max_pixels: see `ImageDataset`.

    Raises:
        ValueError: the settings contradict each other or fit no image.
    """

    def __init__(
        self,
        *,
        training: bool,
        resize: int | None,
        crop: int | None,
        color: Color,
        views: int,
        preset: Preset,
        transforms: list[Any] | None,
        eval_transforms: list[Any] | None,
        mean: Sequence[float],
        std: Sequence[float],
        max_pixels: int,
    ) -> None:
        if transforms is not None and preset != "resize_crop":
            raise ValueError(f"preset={preset} and a list of transforms exclude each other.")
        self.resize, self.crop, self.color, self.max_pixels = resize, crop, color, max_pixels
        self.channels = 1 if color == "grey" else 3
        self.mean, self.std = list(mean), list(std)
        # Views are differences between random draws: evaluation needs the random transforms too.
        self.random = training or (views > 1 and eval_transforms is None)
        if preset == "center_crop":
            self.random = False
        self.own_list = transforms if self.random else eval_transforms
        self.transforms: list[v2.Transform] = []
        if self.own_list is not None:
            self.transforms = build_transforms(self.own_list)
            try_transforms(self.transforms, self.channels, resize, crop)
        elif self.random:
            self.transforms = preset_transforms(preset, crop, self.channels)
        if views > 1 and not self.transforms and (crop is None or not self.random):
            raise ValueError(
                f"views={views}, but these settings make all views of an image alike: there is "
                "neither a random transform nor a random crop. Choose a preset (simclr_xray), name "
                "transforms, or set crop below resize."
            )

    @classmethod
    def of_evaluation(cls, image: type, node: Mapping[str, Any]) -> Pixels:
        """What an evaluation does to one plain image.

        Args:
            image: the class of the data set, whose signature has the defaults.
            node: its section of a configuration.
        """
        defaults = {name: one.default for name, one in inspect.signature(image).parameters.items()}
        wanted = inspect.signature(cls).parameters
        given = {name: value for name, value in {**defaults, **node}.items() if name in wanted}
        return cls(**{**given, "training": False, "views": 1})

    def keep_sides(self) -> None:
        """Leave out the flip of a preset: reports say left and right.

        A flip that a list of transforms asks for stays, with a warning.
        """
        if self.own_list is None:
            self.transforms = without_flips(self.transforms)
        elif any(flips(transform) for transform in self.transforms):
            logger.warning(
                "transforms flip images left to right while their reports name sides: "
                "leave RandomHorizontalFlip out unless that is what you want."
            )

    def plain(self, image: Tensor) -> Tensor:
        """A decoded image as an evaluation sees it: uint8 [C, H, W], resized and cropped."""
        if self.resize is not None:
            image = resize_short_side(image, self.resize)
        return self.transformed(image, 0, 0, 0, 0)

    def transformed(self, image: Tensor, *draw: int, shared: bool = False) -> Tensor:
        """An image after transforms and crop.

        Args:
            image: uint8 [C, H, W], resized.
            draw: what the random numbers depend on: seed, epoch, line and view.
            shared: whether others see the memory of the image, so that it is not written to.
        """
        if shared and (self.transforms or self.crop is None):
            image = image.clone()
        if not self.random and not self.transforms:
            return image if self.crop is None else crop_square(image, self.crop, random=False)
        with seeded(stable_seed("image", *draw)):
            for transform in self.transforms:
                image = transform(image)
            if self.crop is not None:
                image = crop_square(image, self.crop, random=self.random)
        return image

    def normalized(self, pixels: Tensor) -> Tensor:
        """Normalised float32 images of three channels: uint8 [..., C, H, W] to [..., 3, H, W]."""
        # (pixels / 255 - mean) / std, without a further copy of the batch for each operation
        scale, shift = constants(_scale_and_shift, tuple(self.mean), tuple(self.std), like=pixels)
        images = (pixels * scale).sub_(shift)
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


def _scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What pixels are multiplied by, and what is subtracted then, each [C, 1, 1]."""
    middle, spread = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    return 1 / (255 * spread), middle / spread


def build_transforms(entries: Sequence[Any]) -> list[v2.Transform]:
    """Build transforms from a list of `{name: {args}}` or bare names.

    An argument called `transforms` (of `RandomApply`, say) is such a list itself.

    Raises:
        ValueError: an unknown name or arguments that the transform refuses.
    """
    built = []
    for entry in entries:
        call = {entry: None} if isinstance(entry, str) else entry
        if not isinstance(call, Mapping) or len(call) != 1:
            raise ValueError(f"A transform is written `name` or `{{name: {{args}}}}`, not {entry}.")
        [(name, arguments)] = call.items()
        built.append(_build_transform(name, dict(arguments or {})))
    return built


def _build_transform(name: str, arguments: dict[str, Any]) -> v2.Transform:
    transform = getattr(v2, name, None)
    if not (isinstance(transform, type) and issubclass(transform, v2.Transform)):
        known = [n for n in dir(v2) if isinstance(getattr(v2, n), type)]
        raise ValueError(f"torchvision has no transform named '{name}'.{nearest(name, known)}")
    if isinstance(arguments.get("transforms"), Sequence):
        arguments["transforms"] = build_transforms(arguments["transforms"])
    try:
        return transform(**arguments)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"The transform {name} does not take {arguments}: {error}.") from None


class GaussianBlur(v2.Transform):
    """`torchvision.transforms.v2.GaussianBlur`, computed along one axis and then the other.

    The result is the same up to rounding, in a fraction of the time for wide kernels.

    Args:
        kernel_size: width of the kernel in pixels, odd.
        sigma: smallest and largest standard deviation in pixels; drawn uniformly.
    """

    def __init__(self, kernel_size: int, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.kernel_size, self.sigma = kernel_size, sigma

    def make_params(self, flat_inputs: list[Any]) -> dict[str, float]:
        """Draw the standard deviation."""
        low, high = self.sigma
        return {"sigma": low + (high - low) * float(torch.rand(()))}

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Blur one uint8 image [C, H, W]."""
        size, sigma = self.kernel_size, [params["sigma"]]
        rows = v2.functional.gaussian_blur(inpt.float(), [1, size], sigma)
        return v2.functional.gaussian_blur(rows, [size, 1], sigma).round_().to(torch.uint8)


def preset_transforms(preset: Preset, crop: int | None, channels: int) -> list[v2.Transform]:
    """The random part of a preset, which runs between resizing and the final crop.

    - `resize_crop`: nothing; the crop at a random place is the augmentation.
    - `center_crop`: nothing, and the crop is the one in the middle.
    - `convirt`: Zhang et al. 2020 (arXiv:2010.00747), section 3: crop of 0.6 to 1.0 of the area,
      horizontal flip, rotation up to 20 degrees, translation up to 0.1, scale 0.95 to 1.05,
      brightness and contrast 0.6 to 1.4, Gaussian blur with sigma 0.1 to 3.0.
    - `simclr`: Chen et al. 2020 (arXiv:2002.05709), appendix A: crop of 0.08 to 1.0 of the area,
      flip, colour jitter of strength 1, greyscale, blur. On grey images the jitter of hue and
      saturation and the greyscale step, which mean nothing there, are left out.
    - `simclr_xray`: horizontal flip, and the crop at a random place.

    Raises:
        ValueError: the preset crops and there is no `crop`.
    """
    if preset in ("resize_crop", "center_crop"):
        return []
    flip = v2.RandomHorizontalFlip(p=0.5)
    if preset == "simclr_xray":
        return [flip]
    if crop is None:
        raise ValueError(f"The preset {preset} crops to `crop` pixels, and crop is null.")
    if preset == "convirt":
        return [
            v2.RandomResizedCrop(crop, scale=(0.6, 1.0)),
            flip,
            v2.RandomAffine(20, translate=(0.1, 0.1), scale=(0.95, 1.05), interpolation=_BILINEAR),
            v2.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4)),
            GaussianBlur(_odd(crop), sigma=(0.1, 3.0)),
        ]
    jitter: list[v2.Transform] = [v2.ColorJitter(0.8, 0.8)]
    if channels == 3:
        jitter = [v2.ColorJitter(0.8, 0.8, 0.8, 0.2)]
    return [
        v2.RandomResizedCrop(crop, scale=(0.08, 1.0)),
        flip,
        v2.RandomApply(jitter, p=0.8),
        *([v2.RandomGrayscale(p=0.2)] if channels == 3 else []),
        v2.RandomApply([GaussianBlur(_odd(crop), sigma=(0.1, 2.0))], p=0.5),
    ]


def _odd(crop: int) -> int:
    """Width of a blur kernel: a tenth of the image as in SimCLR, and odd."""
    return crop // 10 | 1


def resize_short_side(image: torch.Tensor, size: int) -> torch.Tensor:
    """Scale uint8 [C, H, W] so that its short side has `size` pixels; antialiased bilinear."""
    height, width = image.shape[-2:]
    new = resized_shape(height, width, size)
    if new == (height, width):
        return image
    if len(image) == 1 and image.dtype == torch.uint8:
        return _resize_grey(image[0], *new)[None]
    return v2.functional.resize(image, list(new), antialias=True)


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image whose short side is scaled to `size` pixels."""
    short, long = min(height, width), max(height, width)
    if short == size:
        return height, width
    other = int(size * long / short)
    return (size, other) if height == short else (other, size)


def _resize_grey(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What `v2.functional.resize` makes of uint8 [H, W], to the bit, in half the time.

    torch scales four channels in the time of one. Rows are independent of each other while their
    width is scaled, and columns while their height is: a quarter of them makes up a channel.
    """
    rows, columns = image.shape
    image = _padded(image, -rows % 4, 0)
    wide = _scaled(image.view(1, 4, -1, columns), len(image) // 4, width).view(-1, width)
    wide = _padded(wide[:rows], 0, -width % 4)
    stacked = wide.view(1, rows, -1, 4).permute(0, 3, 1, 2)  # neighbours are channels, no copy
    high = _scaled(stacked, height, wide.shape[1] // 4)
    return high.permute(0, 2, 3, 1).reshape(height, -1)[:, :width].contiguous()


def _scaled(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return interpolate(image, [height, width], mode="bilinear", antialias=True)


def _padded(image: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[H, W] with some more rows and columns, which may hold anything."""
    if not rows and not columns:
        return image
    height, width = image.shape
    larger = image.new_zeros(height + rows, width + columns)
    larger[:height, :width] = image
    return larger


def crop_square(image: torch.Tensor, size: int, *, random: bool) -> torch.Tensor:
    """Cut a square of `size` pixels from [C, H, W], at a random place or in the middle.

    Raises:
        ValueError: the image is smaller than the square.
    """
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    if min(height, width) < size:
        raise ValueError(
            f"an image of {height} x {width} pixels is too small for crop={size}; "
            "lower crop or set resize to at least as much"
        )
    if random:
        top = int(torch.randint(height - size + 1, ()))
        left = int(torch.randint(width - size + 1, ()))
    else:
        top, left = (height - size) // 2, (width - size) // 2
    return image[..., top : top + size, left : left + size]


def try_transforms(
    transforms: Sequence[v2.Transform], channels: int, resize: int | None, crop: int | None
) -> None:
    """Run transforms once, so that a list that cannot work is found before training.

    Raises:
        ValueError: one fails, or gives something other than uint8 [C, H, W] that can be cropped.
    """
    side = max(resize or 0, crop or 0, 64)
    image = torch.zeros(channels, side, side, dtype=torch.uint8)
    for transform in transforms:
        name = type(transform).__name__
        try:
            with seeded(0):
                result = transform(image)
        except Exception as error:  # whatever it raises, it cannot be used
            raise ValueError(f"The transform {name} fails on an image: {error}.") from error
        if not isinstance(result, torch.Tensor) or result.dtype != torch.uint8:
            made = result.dtype if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(
                f"The transform {name} makes {made}; images stay uint8 tensors until they are on "
                "the device, where they are scaled and normalised (see mean and std). Leave it out."
            )
        if result.dim() != 3 or result.shape[0] != channels:
            raise ValueError(
                f"The transform {name} makes shape {list(result.shape)}, not [{channels}, H, W] "
                f"with {channels} channel(s) as the color setting asks."
            )
        image = result
    if crop is not None:
        crop_square(image, crop, random=False)


def without_flips(transforms: Sequence[v2.Transform]) -> list[v2.Transform]:
    """The transforms that keep left and right in place."""
    return [transform for transform in transforms if not flips(transform)]


def flips(transform: v2.Transform) -> bool:
    """Whether a transform, or one inside it, may swap left and right."""
    inside = getattr(transform, "transforms", ())  # a plain list, which `modules()` does not see
    return isinstance(transform, v2.RandomHorizontalFlip) or any(flips(one) for one in inside)


def check_sizes(samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse `images` of several sizes in the samples of a batch.

    Raises:
        DataError: there are several; each is named with a sample.
    """
    shapes = {tuple(image.shape): s["index"] for s in samples for image in s["images"]}
    if len(shapes) > 1:
        found = ", ".join(
            f"{shape[1]} x {shape[2]} (sample {index})" for shape, index in shapes.items()
        )
        raise DataError(
            f"The images of a batch must have one size; found {found}. Set crop, or end "
            "the transforms with one that gives a fixed size."
        )
