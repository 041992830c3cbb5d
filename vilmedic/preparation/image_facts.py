"""What the images of a split are like, found by decoding them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vilmedic.datasets.decode import UndecodableImage, decode_file
from vilmedic.datasets.dicom import DICOM_SUFFIXES
from vilmedic.datasets.pictures import Pictures


@dataclass
class ImageFacts:
    """The images of a split.

    Attributes:
        looked_at: how many were decoded.
        unreadable: `file:line: path: reason` of each that cannot be decoded.
        blank: `file:line: path` of each whose pixels all have one value.
        sizes: height and width of each one decoded.
        means: mean grey level of each one decoded.
        modes: how many are of each format and mode, such as `JPEG L`.
        contents: a digest of the pixels of each that is not blank, by its path.
    """

    looked_at: int = 0
    unreadable: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    contents: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Look:
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    mean: float = 0.0
    blank: bool = False
    reason: str = ""
    content: str = ""


def examine_images(
    pictures: Pictures, skipped: set[int], *, most: int | None, workers: int, title: str
) -> ImageFacts:
    """Decode the images of a split.

    Args:
        pictures: where they are.
        skipped: lines to leave out, as images of theirs are missing.
        most: images to look at, evenly over the split; None takes all.
        workers: threads, 0 for one a core.
        title: what the progress bar says.
    """
    jobs = [
        (line, number)
        for line in range(len(pictures.texts))
        if line not in skipped
        for number in range(len(pictures.names(line)))
    ]
    if most is not None and most < len(jobs):
        jobs = [jobs[place] for place in np.linspace(0, len(jobs) - 1, most).astype(int)]
    facts = ImageFacts(looked_at=len(jobs))
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        looks = pool.map(lambda job: _look(pictures, *job), jobs)
        bar = tqdm(looks, title, len(jobs), unit="image", leave=False, disable=None)
        for (line, number), look in zip(jobs, bar, strict=True):
            where = pictures.texts.where(line)
            if look.reason:
                facts.unreadable.append(f"{where}: {look.reason}")
                continue
            facts.modes[look.mode] += 1
            facts.sizes.append(look.size)
            facts.means.append(look.mean)
            if look.content:
                facts.contents[pictures.places(line)[number]] = look.content
            if look.blank:
                facts.blank.append(f"{where}: {pictures.places(line)[number]}")
    return facts


def _look(pictures: Pictures, line: int, number: int) -> _Look:
    name = pictures.places(line)[number]
    try:
        with pictures.open(line, number) as file:
            image = decode_file(file, name)
            file.seek(0)
            mode = _mode(file, name)
    except UndecodableImage as error:
        return _Look(reason=str(error))
    size = (int(image.shape[1]), int(image.shape[2]))
    blank = bool(image.min() == image.max())
    content = "" if blank else _digest(image)
    return _Look(mode, size, float(image.float().mean()), blank, content=content)


def _digest(image: torch.Tensor) -> str:
    """The same text for the same pixels, in whatever format a file holds them."""
    digest = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.numpy().tobytes())
    return digest.hexdigest()


def _mode(file: IO[bytes], name: str) -> str:
    """Format and kind of pixels of a file that has been decoded."""
    suffix = Path(name).suffix.lower()
    if suffix == ".npy":
        return "NPY"
    try:
        with Image.open(file) as image:
            return f"{image.format} {image.mode}"
    except Exception:  # Pillow does not know DICOM, which is the one format left
        return "DICOM" if suffix in DICOM_SUFFIXES else "DICOM (other suffix)"
