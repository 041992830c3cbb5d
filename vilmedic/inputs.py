"""Image batches for a model from paths, Pillow images, arrays or folders."""

from __future__ import annotations

import io
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vilmedic.datasets.decode import (
    SUFFIXES,
    UndecodableImage,
    check_size,
    decode_file,
    decode_image,
)
from vilmedic.datasets.image_cache import ImageCache
from vilmedic.datasets.image_source import ImageFiles, resized_shape
from vilmedic.datasets.lines import Lines, join_names
from vilmedic.datasets.transforms import Pixels
from vilmedic.errors import ConfigError, DataError
from vilmedic.files import core_count, walk_files

logger = logging.getLogger(__name__)

Source = str | Path | Image.Image | np.ndarray | Tensor
"""An image: a file that `dataset.image` reads, a Pillow image, or an array [H, W] or [H, W, 3]
with the rules of `.npy` files; tensors may also be [C, H, W]."""
Sources = Source | Iterable[Source]
OnError = Literal["raise", "skip"]
Groups = list[tuple[list[int], Tensor]]
"""Images of one size each: their places in the batch, and uint8 [n, C, H, W]."""
AHEAD = 2  # batches read ahead of the model


def images_in(folder: str | Path) -> list[str]:
    """The paths of all images below a folder, sorted by name, folder by folder.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not isinstance(folder, str | Path):
        raise DataError(f"images_in: given {folder!r}, allowed: a folder.")
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: there is no such folder.")
    found = [
        os.path.join(folder, path.relative_to(folder))
        for path in walk_files(Path(folder))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise DataError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES)[:12])}, ...).")
    return found


def listed(images: Sources) -> Iterable[Source]:
    """Yield images one by one, from a folder, several images or a single one."""
    if isinstance(images, str | Path):
        return images_in(images) if os.path.isdir(images) else [images]
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return [images] if images.ndim < 4 else list(images)
    if not isinstance(images, Iterable):
        raise DataError(
            f"images: given {images!r}, allowed: a path, a folder, a Pillow image, an array, a "
            "tensor, or several of them."
        )
    return images


class Preprocess:
    """Image preprocessing for a model, exactly as in its evaluation.

    Args:
        pixels: the image preprocessing of the run.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        # Random transforms of an evaluation use the global generator of the process.
        self._drawing: AbstractContextManager[Any] = Lock() if pixels.transforms else nullcontext()

    def __call__(self, image: Source) -> Tensor:
        """One image as float32 [3, H, W], normalised.

        Raises:
            UndecodableImage: it cannot be read.
        """
        return self.pixels.normalized(self.read(image))

    def read(self, image: Source, name: str = "image") -> Tensor:
        """One image before it is normalised: uint8 [C, H, W], resized and cropped.

        Args:
            image: the image.
            name: name for messages if it is not a file.

        Raises:
            UndecodableImage: it cannot be read.
        """
        pixels = self.pixels
        if isinstance(image, str | Path):
            name = str(image)
            decoded = decode_image(image, pixels.color, max_pixels=pixels.max_pixels)
        else:
            content, suffix = _as_file(image, name)
            decoded = decode_file(
                content, f"{name}{suffix}", pixels.color, max_pixels=pixels.max_pixels
            )
        return self._plain(decoded, name)

    def batches(
        self,
        images: Iterable[Source],
        size: int,
        *,
        workers: int | None = None,
        on_error: OnError = "raise",
        cache: str | Path | None = None,
    ) -> Iterator[tuple[Groups, list[str]]]:
        """Batches of images, read ahead by threads.

        Args:
            images: any number of them.
            size: images per batch; only the last one has fewer.
            workers: threads; None takes one per core.
            on_error: whether an image that cannot be read is an error, or left out with a warning.
            cache: see `TrainedModel.embed_images`.

        Yields:
            The images of a batch by size, and for each the reason if it is missing, else empty.

        Raises:
            ConfigError: an option is out of its range.
            DataError: an image cannot be read.
        """
        if on_error not in get_args(OnError):
            raise ConfigError(
                f"on_error: given '{on_error}', allowed: {', '.join(get_args(OnError))}."
            )
        if workers is not None and (not isinstance(workers, Integral) or workers < 1):
            raise ConfigError(f"workers: given {workers!r}, allowed: integer >= 1.")
        return self._batches(self._reader(images, cache), images, size, workers, on_error)

    def _batches(
        self,
        read: Callable[[int, Source], Tensor],
        images: Iterable[Source],
        size: int,
        workers: int | None,
        on_error: OnError,
    ) -> Iterator[tuple[Groups, list[str]]]:
        numbered = iter(enumerate(images))
        waiting: deque[list[Future[Tensor]]] = deque()
        with ThreadPoolExecutor(workers or core_count(), thread_name_prefix="image") as pool:
            try:
                while True:
                    while len(waiting) <= AHEAD:
                        some = [pool.submit(read, *one) for one in islice(numbered, size)]
                        if not some:
                            break
                        waiting.append(some)
                    if not waiting:
                        return
                    yield _batch(waiting.popleft(), on_error)
            finally:
                pool.shutdown(cancel_futures=True)

    def _reader(
        self, images: Iterable[Source], cache: str | Path | None
    ) -> Callable[[int, Source], Tensor]:
        if cache is None:
            return lambda number, image: self.read(image, f"image {number}")
        paths = list(images) if isinstance(images, Sequence) else []
        if not paths or not all(isinstance(path, str | Path) for path in paths):
            raise DataError("cache: keeps images that are given as a list of paths.")
        pixels = self.pixels
        texts = Lines([join_names([os.path.abspath(str(path))]) for path in paths], Path("images"))
        files = ImageFiles(texts, Path(), "", pixels.color, pixels.resize, 1, pixels.max_pixels)
        files.interpolation = pixels.interpolation
        kept = ImageCache(files, Path(cache), "images", set(files.missing()))

        def read(number: int, image: Source) -> Tensor:
            if not os.path.exists(str(image)):
                raise UndecodableImage(f"{image} does not exist.")
            with self._drawing:
                return pixels.transformed(kept.read(number)[0], 0, 0, 0, 0, shared=True)

        return read

    def _plain(self, decoded: Tensor, name: str) -> Tensor:
        pixels = self.pixels
        if pixels.resize is not None:
            wanted = resized_shape(decoded.shape[1], decoded.shape[2], pixels.resize)
            check_size(*wanted, pixels.max_pixels, f"{name}, resized to {pixels.resize},")
        try:
            with self._drawing:
                return pixels.plain(decoded)
        except ValueError as error:
            raise UndecodableImage(f"{name}: {error}.") from None


def _batch(futures: list[Future[Tensor]], on_error: OnError) -> tuple[Groups, list[str]]:
    sizes: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    errors = []
    for place, future in enumerate(futures):
        try:
            image = future.result()
        except DataError as error:
            if on_error == "raise":
                raise
            logger.warning("left out: %s", error)
            errors.append(str(error))
            continue
        errors.append("")
        sizes.setdefault(image.shape, []).append((place, image))
    groups = [
        ([place for place, _ in some], torch.stack([image for _, image in some]))
        for some in sizes.values()
    ]
    return groups, errors


def _as_file(image: Image.Image | np.ndarray | Tensor, name: str) -> tuple[io.BytesIO, str]:
    """Convert an image in memory to a file, so that all images are read the same way."""
    content = io.BytesIO()
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F"):
            return _as_file(np.asarray(upright), name)
        kept = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I;16L")
        upright = upright if upright.mode in kept else upright.convert("RGB")
        upright.save(content, "PNG", compress_level=1)
        return content, ".png"
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        # numpy has no bfloat16
        values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        first = values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3)
        image = values.transpose(1, 2, 0) if first else values
    if not isinstance(image, np.ndarray):
        raise DataError(
            f"{name}: given a {type(image).__name__}, allowed: a path, a Pillow image, an array or "
            "a tensor."
        )
    if image.dtype.hasobject:
        raise DataError(f"{name}: holds {image.dtype} values, which are no image.")
    np.save(content, image, allow_pickle=False)
    return content, ".npy"
