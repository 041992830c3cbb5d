"""From decoded images to what a model takes: sizes, transforms, crop and normalisation."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from vilmedic.datasets.decode import Color
from vilmedic.datasets.sample import seeded, stable_seed
from vilmedic.datasets.transforms import (
    Preset,
    build_transforms,
    crop_square,
    flips,
    preset_transforms,
    resize_short_side,
    try_transforms,
    without_flips,
)

logger = logging.getLogger(__name__)


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
        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        # (pixels / 255 - mean) / std, without a further copy of the batch for each operation
        images = (pixels * (1 / (255 * std))).sub_(mean / std)
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
