"""Image cache: the decoded images of a split in one memory-mapped file.

`<folder>/<split>-<key>/` holds `pixels.u8` (all images in a row, each [C, H, W] in its own size),
`index.npz` (offset and size of each) and `card.json`. The key is a hash of the content of every
file and the settings that decoding depends on; names, paths and times of files are not part of it.
A cache is built under a temporary name, with a lock, and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from vilmedic.datasets.decode import UndecodableImage
from vilmedic.datasets.image_source import ImageSource, first_numbers
from vilmedic.errors import DataError
from vilmedic.files import FULL, core_count
from vilmedic.log import Progress, counted

logger = logging.getLogger(__name__)

VERSION = 3  # raise it when decoding or the layout changes
PIXELS, INDEX, CARD = "pixels.u8", "index.npz", "card.json"


class ImageCache(ImageSource):
    """Memory-mapped cache of decoded and resized images.

    Images named by several lines are stored once. Images that cannot be decoded, or whose
    compressed data a second check finds damaged, are recorded when the cache is built, and reading
    them raises an error.

    Args:
        source: the source of the images.
        folder: folder of the caches.
        split: name of the split.
        skipped: lines that are never read, because an image is missing.

    Raises:
        DataError: the folder cannot be written to, or is full.
    """

    shared = True

    def __init__(self, source: ImageSource, folder: Path, split: str, skipped: set[int]) -> None:
        super().__init__(source.texts, source.color, source.resize, source.most, source.max_pixels)
        self.source, self.interpolation = source, source.interpolation
        self._pixels: torch.Tensor | None = None
        self.channels = 1 if source.color == "grey" else 3
        lines = [line for line in range(len(source.texts)) if line not in skipped]
        contents = source.contents(lines, folder)
        numbers: dict[str, int] = {}
        wanted: list[tuple[int, int]] = []  # line and place of the first mention of each image
        rows: list[list[int]] = [[] for _ in range(len(source.texts))]
        for line, row in zip(lines, contents, strict=True):
            for place, content in enumerate(row):
                if content not in numbers:
                    numbers[content] = len(wanted)
                    wanted.append((line, place))
                rows[line].append(numbers[content])
        self._starts = np.array(first_numbers([len(row) for row in rows]))
        self._numbers = np.array([number for row in rows for number in row], dtype=np.int64)
        settings = {
            "version": VERSION,
            "split": split,
            "color": source.color,
            "resize": source.resize,
            "max_pixels": source.max_pixels,
            "decoders": decoders(),
        }
        if source.interpolation != "bilinear":
            settings["interpolation"] = source.interpolation
        self.path = folder / f"{split}-{_key(settings, numbers)}"
        try:
            self._open_or_build(
                wanted, settings, lambda: source.contents(lines, folder) == contents
            )
        except OSError as error:
            reason = "the disk is full" if error.errno in FULL else error.strerror or str(error)
            raise DataError(
                f"The image cache {self.path} cannot be made: {reason}. Give another folder with "
                "image.cache, lower image.resize, or leave image.cache out."
            ) from error

    def names(self, line: int) -> list[str]:
        """Return the image names of a line."""
        return self.source.names(line)

    def open(self, line: int, number: int) -> IO[bytes]:
        """Open the original file of an image."""
        return self.source.open(line, number)

    def places(self, line: int) -> list[str]:
        """Return the original path of each image of a line."""
        return self.source.places(line)

    def missing(self) -> dict[int, str]:
        """Return the lines with images that were missing when the cache was built."""
        return self.source.missing()

    def contents(self, lines: Sequence[int], folder: Path) -> list[list[str]]:
        """Return digests of the original images of some lines."""
        return self.source.contents(lines, folder)

    def read(self, line: int, numbers: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Read the images of a line as read-only views of the file: uint8 [C, H, W]."""
        pixels, images = self._mapped(), []
        every = self._numbers[self._starts[line] : self._starts[line + 1]].tolist()
        for place in range(len(every)) if numbers is None else numbers:
            number = every[place]
            if number in self.failed:
                raise UndecodableImage(self._failure(line, place))
            start, end = self._offsets[number : number + 2].tolist()
            height, width = self._sizes[number].tolist()
            images.append(pixels[start:end].view(self.channels, height, width))
        return images

    def failures(self) -> dict[int, str]:
        """Return the lines with undecodable images, each with the reason."""
        if not self.failed:
            return {}
        bad = np.flatnonzero(np.isin(self._numbers, list(self.failed)))
        lines = np.searchsorted(self._starts, bad, side="right") - 1
        places = bad - self._starts[lines]
        return {
            line: self._failure(line, place)
            for line, place in zip(lines.tolist(), places.tolist(), strict=True)
        }

    def _failure(self, line: int, place: int) -> str:
        """Return why an image cannot be decoded, after its current path."""
        number = int(self._numbers[self._starts[line] + place])
        return f"{self.source.places(line)[place]}{self.failed[number]}"

    def __getstate__(self) -> dict[str, Any]:
        # Other processes map the file again; pickling the map would copy its content.
        return {**self.__dict__, "_pixels": None}

    def _mapped(self) -> torch.Tensor:
        if self._pixels is None:
            path = self.path / PIXELS
            empty = path.stat().st_size == 0
            content = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is not writable is intended
                self._pixels = torch.from_numpy(content)
        return self._pixels

    def _open_or_build(
        self,
        wanted: list[tuple[int, int]],
        settings: dict[str, Any],
        unchanged: Callable[[], bool],
    ) -> None:
        if not self._open():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("Waiting for another process that builds %s", self.path)
                lock.acquire()
            try:
                if not self._open():
                    self._build(wanted, settings, unchanged)
                    if not self._open():
                        raise DataError(f"The image cache {self.path} changed while it was built.")
            finally:
                lock.release()

    def _open(self) -> bool:
        """Read the index; returns False if the cache is missing or damaged."""
        self._pixels = None
        try:
            with np.load(self.path / INDEX, allow_pickle=False) as index:
                self._offsets, self._sizes = index["offsets"], index["sizes"]
            card = json.loads((self.path / CARD).read_text(encoding="utf-8"))
            self.failed = {int(number): text for number, text in card["failed"].items()}
            return (self.path / PIXELS).stat().st_size == int(self._offsets[-1])
        except FileNotFoundError:
            return False
        except Exception as error:  # a damaged file raises errors of zip, of numpy and others
            logger.warning(
                "The image cache %s is damaged (%s) and is built again", self.path, error
            )
            return False

    def _build(
        self,
        wanted: list[tuple[int, int]],
        settings: dict[str, Any],
        unchanged: Callable[[], bool],
    ) -> None:
        """Decode all images and write them, with the lock held.

        Raises:
            DataError: files were changed in the meantime.
        """
        for left in self.path.parent.glob(f".{self.path.name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)  # left by a killed process
        shutil.rmtree(self.path, ignore_errors=True)
        draft = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        draft.mkdir()
        offsets, sizes, failed = [0], [], {}
        try:
            with open(draft / PIXELS, "wb") as file:
                for number, result in enumerate(self._decoded(wanted)):
                    if isinstance(result, UndecodableImage):
                        line, place = wanted[number]
                        failed[number] = str(result).removeprefix(self.source.places(line)[place])
                        offsets.append(offsets[-1])
                        sizes.append((0, 0))
                        continue
                    file.write(result.numpy().data)
                    offsets.append(offsets[-1] + result.numel())
                    sizes.append((result.shape[1], result.shape[2]))
                _to_disk(file)
            with open(draft / INDEX, "wb") as file:
                shape = np.array(sizes, dtype=np.int32).reshape(-1, 2)
                np.savez(file, offsets=np.array(offsets, dtype=np.int64), sizes=shape)
                _to_disk(file)
            card = {**settings, "images": len(wanted), "bytes": offsets[-1], "failed": failed}
            with open(draft / CARD, "w", encoding="utf-8") as text:
                text.write(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
                _to_disk(text)
            if not unchanged():
                raise DataError(
                    f"Images were changed while the image cache {self.path} was built from them. "
                    "Start again when they are complete."
                )
            os.rename(draft, self.path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        gib = offsets[-1] / 2**30
        images = counted(len(wanted), "image")
        logger.info("Image cache %s: %s, %.2f GiB", self.path, images, gib)

    def _decoded(self, wanted: list[tuple[int, int]]) -> Iterator[torch.Tensor | UndecodableImage]:
        """Yield the images in order, decoded by threads, since decoders release the GIL."""

        def work(item: tuple[int, int]) -> torch.Tensor | UndecodableImage:
            try:
                return self.source.decode_resized(*item, thorough=True).contiguous()
            except UndecodableImage as error:
                return UndecodableImage(str(error))

        threads = min(32, core_count())
        jobs = iter(wanted)
        bar = Progress(f"Caching {self.path.name}", len(wanted), "images")
        with bar, ThreadPoolExecutor(threads) as pool:
            running: list[Future[torch.Tensor | UndecodableImage]]
            running = [pool.submit(work, job) for job in islice(jobs, 4 * threads)]
            try:
                while running:
                    yield running.pop(0).result()
                    running += [pool.submit(work, job) for job in islice(jobs, 1)]
                    bar.update()
            finally:
                for future in running:
                    future.cancel()


def _key(settings: dict[str, Any], contents: Iterable[str]) -> str:
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for content in contents:
        digest.update(f"{content}\n".encode())
    return digest.hexdigest()


def decoders() -> dict[str, str]:
    """Return decoder versions: images decoded by different ones may differ in the last bit."""
    return {name: version(name) for name in ("pillow", "simplejpeg", "tifffile")}


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
