"""Image sources of a split, reading from files, and resizing.

The content of a file is identified by a digest, without reading unchanged files again. A digest is
cached together with the file's metadata when it was read: size, modification time, inode, and
change time (ctime), which no program can set. If all of these are equal, the file has not been
written since, even if its size and modification time were restored. As clocks are coarse, files
changed less than `SETTLED` before they were read are not cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from vilmedic.datasets.decode import (
    DICOM_REMEDY,
    DICOM_SUFFIXES,
    SUFFIXES,
    Color,
    check_size,
    decode_file,
    dicom_available,
    open_image,
)
from vilmedic.datasets.lines import Lines, split_names
from vilmedic.errors import DataError
from vilmedic.files import BLOCK, core_count, open_regular, replacing
from vilmedic.log import progress

logger = logging.getLogger(__name__)

Interpolation = Literal["bilinear", "bicubic"]

SHARD_INDEX = "shards.npz"
"""File name after the split of the index of images in shards."""
SETTLED = 2 * 10**9  # nanoseconds
DIGEST = 16  # bytes
_noted: list[str] = []


class ImageSource(ABC):
    """The images of the lines of a split, decoded and resized.

    Args:
        texts: the lines, each with the names of its images.
        color: grey or colour.
        resize: pixels of the short side; None keeps the size of the file.
        most: images of a line that are used, from its first one on.
        max_pixels: height times width of the largest image, before and after it is resized.
    """

    shared = False
    """Whether `read` returns shared memory, which must not be written to."""
    remedy = ""
    """Advice for missing images."""
    interpolation: Interpolation = "bilinear"
    """Interpolation for resizing."""

    def __init__(
        self, texts: Lines, color: Color, resize: int | None, most: int, max_pixels: int
    ) -> None:
        self.texts, self.color, self.resize, self.most = texts, color, resize, most
        self.max_pixels = max_pixels

    def names(self, line: int) -> list[str]:
        """Return the image names of a line."""
        return split_names(self.texts[line])[: self.most]

    def read(self, line: int, numbers: Sequence[int] | None = None) -> list[torch.Tensor]:
        """The images of a line, uint8 [C, H, W] each.

        Args:
            line: number of the line.
            numbers: which of its images, in this order; None gives all.

        Raises:
            UndecodableImage: one of them cannot be decoded.
        """
        wanted = range(len(self.names(line))) if numbers is None else numbers
        found = {number: self.decode_resized(line, number) for number in dict.fromkeys(wanted)}
        return [found[number] for number in wanted]

    def decode(
        self, line: int, number: int, *, thorough: bool = False, notes: list[str] | None = None
    ) -> torch.Tensor:
        """Decode one image of a line without resizing: uint8 [C, H, W].

        Args:
            line: number of the line.
            number: number of the image in its line.
            thorough: see `decode_file`.
            notes: see `decode_file`; None logs those of the first such file of a process.

        Raises:
            UndecodableImage: it cannot be decoded, or would be too large when it is resized.
        """
        name = self.places(line)[number]
        found: list[str] = []
        with self.open(line, number) as file:
            image = decode_file(
                file,
                name,
                self.color,
                max_pixels=self.max_pixels,
                thorough=thorough,
                notes=found if notes is None else notes,
            )
        if self.resize is not None:
            wanted = resized_shape(image.shape[1], image.shape[2], self.resize)
            check_size(*wanted, self.max_pixels, f"{name}, resized to {self.resize},")
        if found:
            _log_first(name, found)
        return image

    def decode_resized(self, line: int, number: int, *, thorough: bool = False) -> torch.Tensor:
        """One image of a line, resized: uint8 [C, H, W]; see `decode`."""
        image = self.decode(line, number, thorough=thorough)
        return image if self.resize is None else self._resized(image, self.resize)

    def _resized(self, image: torch.Tensor, size: int) -> torch.Tensor:
        return resize_short_side(image, size, self.interpolation)

    @abstractmethod
    def open(self, line: int, number: int) -> IO[bytes]:
        """Open the file of an image, or its content."""

    @abstractmethod
    def places(self, line: int) -> list[str]:
        """Return the place of each image of a line, for messages and descriptions."""

    @abstractmethod
    def missing(self) -> dict[int, str]:
        """Return the lines with missing images, each with a message.

        Raises:
            DataError: a line names no image, or one that cannot be read on this machine.
        """

    @abstractmethod
    def contents(self, lines: Sequence[int], folder: Path) -> list[list[str]]:
        """Return a text for each image of some lines that identifies its content.

        Args:
            lines: numbers of the lines.
            folder: folder for a cache that speeds up later calls.
        """

    def _no_names(self, line: int) -> DataError:
        return DataError(f"{self.texts.where(line)} names no image: '{self.texts[line]}'.")


class ImageFiles(ImageSource):
    """Images in separate files.

    Args:
        texts: the lines, each with paths.
        folder: the folder that paths are relative to.
        ext: added to paths without a known extension, such as `.jpg`.
        color: see `ImageSource`.
        resize: see `ImageSource`.
        most: see `ImageSource`.
        max_pixels: see `ImageSource`.
    """

    def __init__(
        self,
        texts: Lines,
        folder: Path,
        ext: str,
        color: Color,
        resize: int | None,
        most: int,
        max_pixels: int,
    ) -> None:
        super().__init__(texts, color, resize, most, max_pixels)
        self.folder, self.ext = folder, ext
        self.remedy = (
            f"Paths start from image_path={folder}; set that, or ext for paths without an extension"
        )

    def paths(self, line: int) -> list[Path]:
        """The file of each image of a line."""
        return [Path(place) for place in self.places(line)]

    def open(self, line: int, number: int) -> IO[bytes]:
        """The file of an image."""
        return open_image(self.places(line)[number])

    def places(self, line: int) -> list[str]:
        """The paths of a line's images."""
        return [
            os.path.join(self.folder, name if _suffix(name) in SUFFIXES else name + self.ext)
            for name in self.names(line)
        ]

    def missing(self) -> dict[int, str]:
        """Return the lines with missing or irregular files, listing each folder once."""
        present: dict[Path, dict[str, bool]] = {}
        missing: dict[int, str] = {}
        readable = dicom_available()
        for line in range(len(self.texts)):
            where = self.texts.where(line)
            paths = self.paths(line)
            if not paths:
                raise self._no_names(line)
            for path in paths:
                if not readable and path.suffix.lower() in DICOM_SUFFIXES:
                    raise DataError(f"{where}: {path}: {DICOM_REMEDY}")
                folder = path.parent
                if folder not in present:
                    present[folder] = _listed(folder)
                is_file = present[folder].get(path.name)
                if not is_file:
                    reason = (
                        "does not exist" if is_file is None else "is no file, nor a link to one"
                    )
                    missing.setdefault(line, f"{where}: {path} {reason}")
        return missing

    def contents(self, lines: Sequence[int], folder: Path) -> list[list[str]]:
        """Return a digest of each file with its suffix, which identifies some formats."""
        rows = [self.paths(line) for line in lines]
        digests = file_contents((path for row in rows for path in row), folder)
        return [[f"{digests[path]} {path.suffix.lower()}" for path in row] for row in rows]


def file_contents(paths: Iterable[Path], folder: Path) -> dict[Path, str]:
    """Return a digest of the content of each file, or `missing` or `unreadable`.

    Args:
        paths: the files.
        folder: folder of the digest cache, one file per list of paths. If it cannot be written,
            the next call reads all files again.
    """
    every = list(dict.fromkeys(paths))
    together = _short("\n".join(os.path.abspath(path) for path in every).encode())
    memory = folder / f".contents-{together.hex()}.npy"
    known, now = _load(memory), time.time_ns()
    states = [_state(path, now) for path in every]
    found = {
        path: known[state[0]].hex()
        for path, state in zip(every, states, strict=True)
        if state is not None and state[0] in known
    }
    unknown = [path for path in every if path not in found]
    if unknown:
        with ThreadPoolExecutor(min(32, core_count())) as pool:
            digests = pool.map(_digest, unknown)
            shown = progress(digests, "Reading the image files", "files", len(unknown))
            found |= zip(unknown, shown, strict=True)
        _save(
            memory,
            [
                state[0] + bytes.fromhex(found[path])
                for path, state in zip(every, states, strict=True)
                if state is not None and state[1] and len(found[path]) == 2 * DIGEST
            ],
        )
    return found


def file_digests(paths: Sequence[Path]) -> list[str]:
    """Read each file and return a digest of its content; empty for unreadable files."""
    with ThreadPoolExecutor(min(32, core_count())) as pool:
        found = list(pool.map(_digest, paths))
    return [digest if len(digest) == 2 * DIGEST else "" for digest in found]


def first_numbers(counts: Sequence[int]) -> list[int]:
    """Offset of each line's first image in the list of all images."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def _short(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _state(path: Path, now: int) -> tuple[bytes, bool] | None:
    """Return a file's metadata, and whether any later change is sure to alter it."""
    try:
        at = path.stat()
    except OSError:
        return None
    times = (at.st_mtime_ns, at.st_ctime_ns)
    text = f"{path.absolute()}\n{at.st_size} {at.st_ino} {at.st_dev} {times}"
    return _short(text.encode()), max(times) < now - SETTLED


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST)
    try:
        with open_regular(path) as file:
            while chunk := file.read(BLOCK):
                digest.update(chunk)
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "unreadable"
    return digest.hexdigest()


def _load(path: Path) -> dict[bytes, bytes]:
    """Read cached digests by metadata; none if the cache is missing or damaged."""
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return {}
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 2 * DIGEST:
        return {}
    return {row[:DIGEST]: row[DIGEST:] for row in map(bytes, rows)}


def _save(path: Path, rows: Sequence[bytes]) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, f".{os.getpid()}") as draft, open(draft, "wb") as file:
            np.save(file, np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 2 * DIGEST))


def _listed(folder: Path) -> dict[str, bool]:
    """List a folder: each name with whether it is a file, or a link to one."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _is_file(entry) for entry in entries}
    except OSError:
        return {}


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to a place without permission
        return False


def _log_first(name: str, notes: list[str]) -> None:
    """Log the notes of the first image of a process that has any; there may be very many."""
    if not _noted:
        _noted.append(name)
        logger.warning(
            "%s: %s. Further such images are not logged; data/check.py lists all of them.",
            name,
            "; ".join(notes),
        )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def resize_short_side(
    image: torch.Tensor, size: int, interpolation: Interpolation = "bilinear"
) -> torch.Tensor:
    """Scale uint8 [C, H, W] so that its short side has `size` pixels; antialiased."""
    height, width = image.shape[-2:]
    new = resized_shape(height, width, size)
    if new == (height, width):
        return image
    return resize_to(image, *new, interpolation)


def resize_to(
    image: torch.Tensor, height: int, width: int, interpolation: Interpolation = "bilinear"
) -> torch.Tensor:
    """Scale uint8 [C, H, W] to a height and a width; antialiased."""
    if image.shape[-2:] == (height, width):
        return image
    if interpolation == "bicubic":
        mode = v2.InterpolationMode.BICUBIC
        return v2.functional.resize(image, [height, width], mode, antialias=True)
    if len(image) == 1 and image.dtype == torch.uint8:
        return _resize_grey(image[0], height, width)[None]
    return v2.functional.resize(image, [height, width], antialias=True)


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image whose short side is scaled to `size` pixels."""
    short, long = min(height, width), max(height, width)
    if short == size:
        return height, width
    other = int(size * long / short)
    return (size, other) if height == short else (other, size)


def _resize_grey(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [H, W] bit for bit like `v2.functional.resize`, in half the time.

    torch scales four channels in the time of one. Rows are independent while the width is scaled,
    and columns while the height is scaled: a quarter of them forms a channel.
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
    """Pad [H, W] with rows and columns of arbitrary values."""
    if not rows and not columns:
        return image.contiguous()
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
