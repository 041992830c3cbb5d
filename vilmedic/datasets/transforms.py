"""Preparation of decoded images for a model: resizing, transforms, crop, normalisation.

Transforms are torchvision's own by name, image by image on uint8 tensors [C, H, W] on the CPU, or
published sets of them as presets, most of which is computed for whole batches (see `augment`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from vilmedic.datasets.aligned import seeded, stable_seed
from vilmedic.datasets.decode import Color
from vilmedic.datasets.image_source import Interpolation, crop_square, resize_short_side
from vilmedic.device import constants
from vilmedic.errors import DataError, nearest

if TYPE_CHECKING:
    from vilmedic.datasets.augment import Augmentation

logger = logging.getLogger(__name__)

_FIXED = (v2.CenterCrop, v2.Compose, v2.Grayscale, v2.Identity, v2.Pad, v2.Resize, v2.RGB)
_CACHED = 2**18
"""Pixels of images that are processed together on a CPU: 1 MB as floats."""

Preset = Literal["resize_crop", "center_crop", "convirt", "simclr", "simclr_xray"]


class Pixels:
    """Image preprocessing of a data set, from decoded image to model input.

    Args:
        training: whether to apply the random transforms of training.
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
        interpolation: see `ImageDataset`.

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
        interpolation: Interpolation = "bilinear",
    ) -> None:
        if transforms is not None and preset != "resize_crop":
            raise ValueError(f"preset={preset} and a list of transforms exclude each other.")
        self.resize, self.crop, self.color, self.max_pixels = resize, crop, color, max_pixels
        self.interpolation = interpolation
        self.channels = 1 if color == "grey" else 3
        self.mean, self.std = list(mean), list(std)
        # Views are differences between random draws: evaluation needs the random transforms too.
        self.random = training or (views > 1 and eval_transforms is None)
        if preset == "center_crop":
            self.random = False
        self.own_list = transforms if self.random else eval_transforms
        self.transforms: list[v2.Transform] = []
        self.augmentation: Augmentation | None = None
        if self.own_list is not None:
            self.transforms = build_transforms(self.own_list)
            try_transforms(self.transforms, self.channels, resize, crop)
        elif self.random and preset != "resize_crop":
            from vilmedic.datasets.augment import preset_augmentation

            self.augmentation = preset_augmentation(preset, crop, self.channels)
        flipped = self.augmentation is not None and self.augmentation.flip
        moved = crop is not None and self.random
        if views > 1 and not (self.transforms or flipped or moved):
            raise ValueError(
                f"views={views}, but these settings make all views of an image alike: there is "
                "neither a random transform nor a random crop. Choose a preset (simclr_xray), name "
                "transforms, or set crop below resize."
            )

    @classmethod
    def of_evaluation(cls, image: type, node: Mapping[str, Any]) -> Pixels:
        """Return the preprocessing of an evaluation for one plain image.

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
        if self.augmentation is not None:
            self.augmentation = replace(self.augmentation, flip=False)
        elif any(flips(transform) for transform in self.transforms):
            logger.warning(
                "transforms flip images left to right while their reports name sides: "
                "leave RandomHorizontalFlip out unless that is what you want."
            )

    def plain(self, image: Tensor) -> Tensor:
        """Preprocess a decoded image as for an evaluation: uint8 [C, H, W], resized and cropped."""
        if self.resize is not None:
            image = resize_short_side(image, self.resize, self.interpolation)
        return self.transformed(image, 0, 0, 0, 0)

    def transformed(self, image: Tensor, *draw: int, shared: bool = False) -> Tensor:
        """Apply transforms and crop to an image, uint8 [C, H, W]; see `cut` for the arguments."""
        image, row = self.cut(image, *draw, shared=shared)
        if not row or self.augmentation is None:
            return image
        return self.augmentation.apply(image[None], torch.tensor([row]))[0].to(torch.uint8)

    def cut(self, image: Tensor, *draw: int, shared: bool = False) -> tuple[Tensor, list[float]]:
        """Apply the steps at reading time to an image; returns it with the numbers for `augmented`.

        Args:
            image: uint8 [C, H, W], resized.
            draw: seed, epoch, line and view, which the random numbers depend on.
            shared: whether the memory of the image is shared and must not be written to.

        Returns:
            uint8 [C, crop, crop], or [C, H, W] without a crop, and no numbers if no step is left.
        """
        if shared and (self.transforms or self.crop is None):
            image = image.clone()
        if not self.random and not self.transforms:
            return image if self.crop is None else crop_square(image, self.crop, random=False), []
        with seeded(stable_seed("image", *draw)):
            if self.augmentation is not None:
                return self.augmentation.cut(image)
            for transform in self.transforms:
                image = transform(image)
            if self.crop is not None:
                image = crop_square(image, self.crop, random=self.random)
        return image, []

    def normalized(self, pixels: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normalised float32 images of three channels, on their device.

        Args:
            pixels: uint8 [..., C, H, W].
            rows: float32 [..., N], the numbers of `cut` where it left something to do.

        Returns:
            float32 [..., 3, H, W].
        """
        scale, shift = constants(_scale_and_shift, tuple(self.mean), tuple(self.std), like=pixels)
        flat = pixels.reshape(-1, *pixels.shape[-3:])
        channels, size = max(flat.shape[1], len(scale)), flat.shape[2:]
        images = torch.empty(len(flat), channels, *size, device=pixels.device)
        # On a CPU a few images at a time, so that intermediate results stay in the cache of a core.
        worked_on = images if rows is None else flat
        cached = _CACHED // worked_on.shape[1:].numel()
        most = max(1, cached if pixels.device.type == "cpu" else len(flat))
        for start in range(0, len(flat), most):
            part = slice(start, start + most)
            values = flat[part]
            if rows is not None and self.augmentation is not None:
                values = self.augmentation.apply(values, rows.reshape(-1, rows.shape[-1])[part])
            # (values / 255 - mean) / std, without a further copy for each operation
            torch.mul(values, scale, out=images[part]).sub_(shift)
        images = images.view(*pixels.shape[:-3], channels, *size)
        return images.expand(*images.shape[:-3], 3, *size)


def _scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return scale and offset of the normalisation, each [C, 1, 1]."""
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


def try_transforms(
    transforms: Sequence[v2.Transform], channels: int, resize: int | None, crop: int | None
) -> None:
    """Run transforms once, so that an invalid list is found before training.

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
        except Exception as error:  # transforms raise many kinds
            raise ValueError(f"The transform {name} fails on an image: {error}.") from error
        if not isinstance(result, torch.Tensor) or result.dtype != torch.uint8:
            made = result.dtype if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(
                f"The transform {name} makes {made}; images stay uint8 tensors until they are on "
                "the device, where they are scaled and normalised (see mean and std). Leave it out."
            )
        if result.dim() != 3 or result.shape[0] != channels:
            raise ValueError(
                f"The transform {name} makes shape {list(result.shape)}, not [{channels}, H, W], "
                "as the key color asks."
            )
        image = result
    if crop is not None:
        crop_square(image, crop, random=False)


def flips(transform: v2.Transform) -> bool:
    """Return whether a transform, or one inside it, may swap left and right."""
    inside = getattr(transform, "transforms", ())  # a plain list, which `modules()` skips
    return isinstance(transform, v2.RandomHorizontalFlip) or any(flips(one) for one in inside)


def is_fixed(transform: v2.Transform) -> bool:
    """Return whether a transform draws no random numbers."""
    inside = getattr(transform, "transforms", ())
    return type(transform) in _FIXED and all(is_fixed(one) for one in inside)


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
