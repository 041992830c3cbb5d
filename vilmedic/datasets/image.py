"""Image data set: one or several images per line."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from vilmedic.config.types import (
    Above,
    AsLongAs,
    AtMost,
    Between,
    Calls,
    Means,
    Runtime,
    Side,
    Spreads,
    UsedWith,
)
from vilmedic.datasets.aligned import (
    IMAGE_FEATURES,
    AlignedDataset,
    AlignedPart,
    Batch,
    Sample,
    stable_seed,
)
from vilmedic.datasets.decode import Color, UndecodableImage
from vilmedic.datasets.image_source import SHARD_INDEX, ImageFiles, ImageSource, resized_shape
from vilmedic.datasets.lines import Lines, listed, read_lines
from vilmedic.datasets.transforms import Pixels, check_sizes, is_fixed
from vilmedic.errors import DataError

if TYPE_CHECKING:
    from vilmedic.datasets.image_cache import ImageCache

Window = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, as fractions of its width and height."""

GIB = 2**30
Changed = TypeVar("Changed")


class ImageDataset(AlignedPart):
    """Images read from `<root>/<split>.<file>`: one path per line, several separated by commas.

    An image is decoded, resized, put through the transforms and cropped, in this order. The loader
    delivers uint8; `prepare` makes the floats on the device. What a preset does to geometry,
    colours and sharpness after its crop is done there too, on whole batches.

    Args:
        root: folder that holds the line files.
        file: name of the line files after the split.
        image_path: folder that the paths start from; null takes the folder `images` in root when
            there is one, else root. Where root holds an index of shards (see data/make_shards.py):
            the folder or the http(s) URL of the shards; null takes root.
        ext: file extension of paths that are written without one, such as jpg.
        resize: pixels of the short side after resizing; null keeps the size of the file.
        interpolation: how images are resized, antialiased either way.
        crop: side of the square cut out last, at a random place in training and in the middle in
            evaluation; null cuts nothing.
        multi_image: most images a sample may have; with 1 the first image of a line is taken.
        image_choice: with multi_image above 1, all gives a model every image of a sample; random
            draws one at each step of training, for each of several views another one as long as
            there are others, and evaluation takes the first.
        views: differently augmented copies of the image that a sample has, or of each image.
        color: decode to one grey channel or to three colour channels; models get three either way.
        preset: augmentation in training. resize_crop is the random crop alone, center_crop is no
            augmentation at all, convirt, simclr and simclr_xray are the published sets (their flip
            is left out next to reports).
        transforms: augmentation in training as a list of torchvision v2 transforms, instead of a
            preset.
        eval_transforms: transforms in evaluation; null applies none, or with several views those
            of training.
        mean: mean of each colour channel, or one number for all, subtracted after scaling to 0..1
            (default: ImageNet); as many numbers as std has.
        std: standard deviation of each colour channel, or one number for all (default: ImageNet).
        cache: folder in which decoded and resized images are kept, in one memory-mapped file per
            split; null decodes the files in every epoch.
        spool: folder for shards that come from a URL; null takes the folder `spool` in root.
        spool_gib: most GiB of shards that it holds; the ones unused for longest are evicted.
        tokens: cache gives the tokens that the frozen VAE of the model makes of images, computed
            once for all epochs and kept in the run directory; null gives images.
        max_pixels: height times width of the largest image, in its file and after resizing; a
            larger one counts as undecodable.
        on_error: whether a missing or undecodable image ends the run or is left out and listed;
            more than one in a hundred ends it in any case.
    """

    features: ClassVar[str] = IMAGE_FEATURES
    fixed_by: ClassVar[str] = "preset=center_crop, image_choice=all and no random eval_transforms"

    def __init__(
        self,
        *,
        split: Runtime[str],
        training: Runtime[bool],
        seed: Runtime[int],
        run_dir: Runtime[Path] = Path(),
        root: str,
        file: str = "image.tok",
        image_path: str | None = None,
        ext: str | None = None,
        resize: Side | None = 256,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        crop: Side | None = 224,
        multi_image: Annotated[int, Between(1, 256)] = 1,
        image_choice: Literal["all", "random"] = "all",
        views: Annotated[int, Between(1, 256)] = 1,
        color: Literal["grey", "rgb"] = "grey",
        preset: Annotated[
            Literal["resize_crop", "center_crop", "convirt", "simclr", "simclr_xray"],
            UsedWith("transforms", (None,)),
        ] = "resize_crop",
        transforms: Annotated[list[Any] | None, Calls("torchvision.transforms.v2")] = None,
        eval_transforms: Annotated[list[Any] | None, Calls("torchvision.transforms.v2")] = None,
        mean: Annotated[Means, AsLongAs("std")] = [0.485, 0.456, 0.406],  # noqa: B006  (never changed)
        std: Annotated[Spreads, AsLongAs("mean")] = [0.229, 0.224, 0.225],  # noqa: B006
        cache: str | None = None,
        spool: str | None = None,
        spool_gib: Annotated[float, Above(0), AtMost(1048576)] = 64.0,
        tokens: Literal["cache"] | None = None,
        max_pixels: Annotated[int, Between(1, 2147483647)] = 134217728,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if image_choice == "random" and multi_image == 1:
            raise ValueError(
                "image_choice=random draws among the first multi_image images of a sample, which "
                "is 1. Set multi_image to the most images that a sample has."
            )
        self.pixels = Pixels(
            training=training,
            resize=resize,
            crop=crop,
            color=color,
            views=views,
            preset=preset,
            transforms=transforms,
            eval_transforms=eval_transforms,
            mean=mean,
            std=std,
            max_pixels=max_pixels,
            interpolation=interpolation,
        )
        self.training, self.seed = training, seed
        self.split, self.run_dir, self.tokens = split, Path(run_dir), tokens
        self.resize, self.crop, self.color = resize, crop, color
        self.multi_image, self.views, self.on_error = multi_image, views, on_error
        self.image_choice = image_choice

        texts = read_lines(root, split, file)
        self.source = open_image_source(
            texts,
            root=root,
            split=split,
            image_path=image_path,
            ext=ext,
            color=color,
            resize=resize,
            most=multi_image,
            spool=spool,
            spool_gib=spool_gib,
            max_pixels=max_pixels,
        )
        self.source.interpolation = interpolation
        missing = self.source.missing()
        if missing and on_error == "raise":
            raise DataError(
                f"{listed(list(missing.values()), 'missing image')}. {self.source.remedy}, or "
                "on_error=skip to leave a few samples out."
            )
        if cache is not None:
            from vilmedic.datasets.image_cache import ImageCache

            self._use_cache(ImageCache(self.source, Path(cache), split, set(missing)))
        super().__init__(texts, missing)

    def keep_sides(self) -> None:
        """Leave out flips, since reports say left and right; see `Pixels.keep_sides`."""
        self.pixels.keep_sides()

    def read(self, line: int, epoch: int) -> Sample:
        """Read the images of a line as a list of uint8 [C, H, W], or their precomputed `rows`.

        Raises:
            UndecodableImage: a file cannot be decoded; the message names the line.
        """
        if self.rows is not None:
            name, row = self.rows
            found = row(line)
            if found is None:
                raise UndecodableImage(f"{self.texts.where(line)}: the image cannot be decoded")
            return {name: found}
        cut = self._each(line, epoch, self.pixels.cut)
        rows = [row for _, row in cut]
        augmentation = {"augmentation": torch.tensor(rows)} if rows[0] else {}
        return {"images": [image for image, _ in cut], **augmentation}

    def images(self, line: int, epoch: int = 0) -> list[torch.Tensor]:
        """Read the images of a line, uint8 [C, H, W] each, even if tokens are cached."""
        return self._each(line, epoch, self.pixels.transformed)

    def _each(self, line: int, epoch: int, change: Callable[..., Changed]) -> list[Changed]:
        """Apply a method of `Pixels` to each image of a line."""
        chosen = self.chosen(line, epoch)
        try:
            images = self.source.read(line, chosen)
        except UndecodableImage as error:
            raise UndecodableImage(f"{self.texts.where(line)}: {error}") from error.__cause__
        if self.views > 1 and chosen is None:
            images = [image for image in images for _ in range(self.views)]
        draw = (self.seed, epoch if self.training else 0, line)
        shared = self.source.shared
        try:
            return [change(image, *draw, view, shared=shared) for view, image in enumerate(images)]
        except ValueError as error:
            raise DataError(f"{self.texts.where(line)}: {error}.") from None

    def chosen(self, line: int, epoch: int) -> list[int] | None:
        """Return the numbers of the images of a line to use, one per view; None for all.

        The choice depends on seed, epoch and line alone, as the augmentation does.
        """
        if self.image_choice == "all":
            return None
        if not self.training and self.views == 1:
            return [0]
        epoch = epoch if self.training else 0
        draw = random.Random(stable_seed("image choice", self.seed, epoch, line))
        count = len(self.source.names(line))
        order = draw.sample(range(count), count)
        return [order[view % count] for view in range(self.views)]

    def stack(self, samples: Sequence[Sample]) -> Batch:
        """Batch the images.

        Returns:
            `images` uint8 [B, C, H, W]; with several views [B, V, C, H, W]; with several images
            [B, N, C, H, W], filled up with zeros, and `images_mask` bool [B, N]; with several views
            of several images [B, N, V, C, H, W]. If the preset has steps for the device, also
            `augmentation` float32 with their numbers instead of [C, H, W]. With `rows` only these,
            [B, N]: `image_tokens` or `image_features`.
        """
        if self.rows is not None:
            name, _ = self.rows
            return {name: torch.stack([sample[name] for sample in samples])}
        check_sizes(samples)
        every = {"images": torch.stack([image for sample in samples for image in sample["images"]])}
        if "augmentation" in samples[0]:
            every["augmentation"] = torch.cat([sample["augmentation"] for sample in samples])
        if self.multi_image == 1 or self.image_choice == "random":
            several = (len(samples), self.views)
            return {k: v.unflatten(0, several) if self.views > 1 else v for k, v in every.items()}
        counts = torch.tensor([len(sample["images"]) // self.views for sample in samples])
        mask = torch.arange(self.multi_image) < counts[:, None]
        batch: Batch = {"images_mask": mask}
        for name, values in every.items():
            if self.views > 1:
                values = values.unflatten(0, (-1, self.views))
            batch[name] = values.new_zeros(*mask.shape, *values.shape[1:])
            batch[name][mask] = values
        return batch

    def finish(self, batch: Batch) -> Batch:
        """Make normalised float32 images of three channels, [..., 3, H, W], on their device."""
        if "images" not in batch:
            return batch
        pixels = batch["images"]
        if pixels.dtype != torch.uint8:
            return batch
        rest = dict(batch)
        rows = rest.pop("augmentation", None)
        return rest | {"images": self.pixels.normalized(pixels, rows)}

    @property
    def fixed(self) -> bool:
        """Whether a line gives the same in every epoch."""
        if self.pixels.random or (self.training and self.image_choice == "random"):
            return False
        return not self.training or all(is_fixed(one) for one in self.pixels.transforms)

    def content(self, lines: NDArray[np.int64], folder: Path) -> list[Any]:
        """Return a digest of each image file, and the preparation settings."""
        from vilmedic.datasets.image_cache import VERSION, decoders

        pixels = self.pixels
        how: list[Any] = [VERSION, decoders(), self.resize, self.crop, self.color, self.views]
        how += [self.multi_image, self.image_choice, pixels.max_pixels, pixels.mean, pixels.std]
        how += [pixels.interpolation] if pixels.interpolation != "bilinear" else []
        if pixels.transforms:  # an evaluation may draw them, by the seed of the run
            how += [repr(pixels.own_list), [repr(one) for one in pixels.transforms], self.seed]
        return [how, self.source.contents(lines.tolist(), folder)]

    def properties(self) -> dict[str, Any]:
        """Return the normalisation of pixels."""
        return {"normalization": (self.pixels.mean, self.pixels.std)}

    def show(self, line: int) -> dict[str, Any]:
        """The paths of a line's images."""
        return {"image": self.source.places(line)}

    def original(self, whole: AlignedDataset, index: int) -> tuple[torch.Tensor, Window]:
        """Return the first image of a sample at full size, and the window that evaluation crops.

        Args:
            whole: the data set that contains this part, or itself.
            index: the sample's number in it.

        Returns:
            uint8 [C, H, W], and the window that a model sees of it.
        """
        line = int(whole.kept[index])
        image = self.source.decode(line, 0)
        short = self.resize or min(image.shape[-2:])
        height, width = resized_shape(image.shape[1], image.shape[2], short)
        across, down = (self.crop or width) / width, (self.crop or height) / height
        left, top = (1 - across) / 2, (1 - down) / 2
        return image, (left, top, left + across, top + down)

    def tolerates(self, error: Exception) -> bool:
        """Undecodable images are left out when `on_error` is skip."""
        return self.on_error == "skip" and isinstance(error, UndecodableImage)

    def _use_cache(self, cache: ImageCache) -> None:
        """Read images from a cache from now on; it knows which are undecodable."""
        failed = [f"{cache.texts.where(line)}: {e}" for line, e in cache.failures().items()]
        if failed and self.on_error == "raise":
            raise UndecodableImage(
                f"{listed(failed, 'undecodable image')} Fix them, or set on_error=skip to leave "
                "a few samples out."
            )
        self.source = cache


def image_part(dataset: AlignedDataset) -> ImageDataset:
    """The images of a data set.

    Raises:
        DataError: it has none.
    """
    for part in dataset.parts:
        if isinstance(part, ImageDataset):
            return part
    raise DataError("This data set has no images.")


def open_image_source(
    texts: Lines,
    *,
    root: str,
    split: str,
    image_path: str | None,
    ext: str | None,
    color: Color,
    resize: int | None,
    most: int,
    spool: str | None,
    spool_gib: float,
    max_pixels: int,
) -> ImageSource:
    """The images of a split; see `ImageDataset` for the arguments.

    Raises:
        DataError: shards are not there, or do not belong to the lines.
    """
    index = Path(root) / f"{split}.{SHARD_INDEX}"
    if index.is_file():
        from vilmedic.datasets.shards import ImageShards, ShardIndex, ShardStore

        folder = Path(spool) if spool is not None else Path(root) / "spool"
        store = ShardStore(image_path or root, folder, int(spool_gib * GIB))
        shards = ShardIndex.load(index)
        return ImageShards(texts, shards, store, color, resize, most, max_pixels)
    images = Path(root) / "images"
    default = images if images.is_dir() else Path(root)
    folder = Path(image_path) if image_path is not None else default
    suffix = f".{ext.lstrip('.')}" if ext else ""
    return ImageFiles(texts, folder, suffix, color, resize, most, max_pixels)
