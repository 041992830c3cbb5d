"""Resizing of image folders on disk."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from vilmedic.datasets.decode import (
    HEAD,
    MAX_PIXELS,
    SUFFIXES,
    decode_file,
    open_image,
    suffix_by_content,
)
from vilmedic.datasets.lines import shown
from vilmedic.errors import DataError, nearest
from vilmedic.files import core_count, is_apple_double, open_regular, replacing, walk_files
from vilmedic.log import progress

UNREADABLE = "unreadable.txt"
LEFT_OUT = "left_out.txt"
SETTINGS = "resize.txt"
JPEG_SIDE = 65500  # pixels of the longest side that a JPEG file can have
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


@dataclass
class Resized:
    """Results for the files of a folder.

    Attributes:
        written: images written now.
        present: images that were there from an earlier run.
        unreadable: path and reason of each image, or folder, that could not be read.
        noted: path and note of each image that contradicts its header, and was written.
        other: how many files of other kinds there are, by suffix.
        left_out: path and reason of each file that is no image.
    """

    written: int = 0
    present: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    noted: dict[str, str] = field(default_factory=dict)
    other: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)


def resize_tree(
    source: Path,
    target: Path,
    short_side: int,
    *,
    suffix: str = ".jpg",
    quality: int = 95,
    workers: int = 0,
    force: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Resized:
    """Write every image below a folder with a short side of `short_side` pixels.

    The tree keeps its shape, and links to folders are followed. An image that is in `target` and
    not older than its source is left as it is, so an interrupted run resumes. `unreadable.txt` in
    `target` lists what could not be read, and images that would get the same name, of which none is
    written; `left_out.txt` lists the files that are no images.

    Args:
        source: folder of JPEG, PNG, DICOM or other images that training reads.
        target: folder to write.
        short_side: pixels.
        suffix: `.jpg` or `.png`.
        quality: of a JPEG, 1 to 100.
        workers: processes, 0 for one per core.
        force: convert existing images again.
        max_pixels: height times width of the largest image that is read.

    Raises:
        DataError: there are no images, or `target` holds images that were made with other settings.
    """
    if not source.is_dir():
        raise DataError(f"There is no folder {source}.")
    if target.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{target} lies within {source}; its own images would be taken as well.")
    found = Resized()
    jobs = list(_jobs(source, target, suffix, found))
    if not jobs:
        kinds = shown([f"{n} {kind}" for kind, n in found.other.most_common()]) or "no files"
        raise DataError(f"{source} holds no images, but {kinds}.")
    jobs = _without_clashes(jobs, found)
    since = _note_settings(target, f"short side {short_side}, {suffix}, quality {quality}\n", force)
    work = partial(
        _resize, short_side=short_side, quality=quality, max_pixels=max_pixels, since=since
    )
    for (path, _), (state, text) in zip(jobs, _results(work, jobs, workers), strict=True):
        if state == "present":
            found.present += 1
        elif state == "unreadable":
            found.unreadable[str(path)] = text
        else:
            found.written += 1
            if text:
                found.noted[str(path)] = text
    for name, reasons in ((UNREADABLE, found.unreadable), (LEFT_OUT, found.left_out)):
        text = "".join(f"{path}\t{reason}\n" for path, reason in reasons.items())
        (target / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return found


def resize_short_side_file(
    source: str | Path,
    target: str | Path,
    short_side: int,
    quality: int = 95,
    *,
    max_pixels: int = MAX_PIXELS,
    notes: list[str] | None = None,
) -> None:
    """Write an image again with a short side of `short_side` pixels, its aspect kept.

    The image is decoded as in training (see `vilmedic.datasets.decode`), and its compressed data
    are read a second time for damage. The result is upright and has 8 bits; it is grey when all its
    pixels are. An image that is small already keeps its size. The file appears when it is complete,
    and an interrupted call leaves nothing under its name.

    Args:
        source: the image, in any format that training reads.
        target: where to write it; the suffix, .jpg or .png, says the format.
        short_side: pixels.
        quality: of a JPEG, 1 to 100.
        max_pixels: height times width of the largest image that is read.
        notes: gets what contradicts the header of `source`.

    Raises:
        UndecodableImage: `source` cannot be decoded.
        DataError: `target` has another suffix, or cannot hold the image.
        OSError: `target` cannot be written.
    """
    target = Path(target)
    form = FORMATS.get(target.suffix.lower())
    if form is None:
        raise DataError(
            f"{target}: images are written as {', '.join(FORMATS)}, not as '{target.suffix}'."
            f"{nearest(target.suffix, FORMATS)}"
        )
    image = _shrink(_read(source, max_pixels, notes), short_side)
    options: dict[str, Any] = {}
    if form == "JPEG":
        if max(image.size) > JPEG_SIDE:
            raise DataError(f"{source} is too long for JPEG, {max(image.size)} pixels. Write PNG.")
        options = {"quality": quality, "subsampling": 0, "optimize": True}
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, f".{os.getpid()}-{threading.get_ident()}") as draft:
        image.save(draft, format=form, **options)


def _jobs(source: Path, target: Path, suffix: str, found: Resized) -> Iterator[tuple[Path, Path]]:
    def failed(error: OSError) -> None:
        found.unreadable[str(error.filename)] = _reason(error.filename, error)

    for path in walk_files(source, failed):
        known = path.suffix.lower() in SUFFIXES
        try:
            if is_apple_double(path):
                found.other["._*"] += 1
                found.left_out[str(path)] = "what macOS keeps beside an image, which is none itself"
            elif known or _is_image(path):
                name = path.stem if known else path.name
                yield path, target / path.parent.relative_to(source) / f"{name}{suffix}"
            else:
                found.other[path.suffix or path.name] += 1
                found.left_out[str(path)] = "no image that is read, by name and first bytes"
        except OSError as error:
            found.unreadable[str(path)] = _reason(path, error)


def _is_image(path: Path) -> bool:
    """Return whether the first bytes of a file, which may have no suffix, are those of an image."""
    with open_regular(path) as file:
        return suffix_by_content(file.read(HEAD)) is not None


def _reason(path: str | Path, error: OSError) -> str:
    return f"{path} cannot be read: {error.strerror}."


def _without_clashes(jobs: list[tuple[Path, Path]], found: Resized) -> list[tuple[Path, Path]]:
    """The jobs less those of images that would get the same name, which count as unreadable."""
    sources: dict[Path, list[Path]] = {}
    for path, goal in jobs:
        sources.setdefault(goal, []).append(path)
    for goal, paths in sources.items():
        for path in paths if len(paths) > 1 else ():
            others = shown([str(other) for other in paths if other != path])
            found.unreadable[str(path)] = (
                f"{path} would be written to {goal.name}, as would {others}. Rename one of them."
            )
    return [job for job in jobs if len(sources[job[1]]) == 1]


def _note_settings(target: Path, settings: str, force: bool) -> int:
    """Refuse to mix images of different settings in a folder.

    Returns:
        The time in ns from which on images count: `force` makes it now, also for a later run that
        resumes after an interruption.
    """
    target.mkdir(parents=True, exist_ok=True)
    path = target / SETTINGS
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before not in (None, settings) and not force:
        raise DataError(
            f"{target} holds images made with {str(before).strip()}, not {settings.strip()}. Give "
            "another folder, or --force to make them again."
        )
    if before is None or force:
        path.write_text(settings, encoding="utf-8")
    return path.stat().st_mtime_ns


def _results(
    work: partial[tuple[str, str]], jobs: list[tuple[Path, Path]], workers: int
) -> Iterator[tuple[str, str]]:
    workers = min(workers or core_count(), max(1, len(jobs) // 20))
    if workers == 1:
        yield from progress(map(work, jobs), "Resizing", "images", len(jobs))
        return
    with get_context("spawn").Pool(workers) as pool:
        results = pool.imap(work, jobs, chunksize=8)
        yield from progress(results, "Resizing", "images", len(jobs))


def _resize(
    job: tuple[Path, Path], *, short_side: int, quality: int, max_pixels: int, since: int
) -> tuple[str, str]:
    """Result for an image: present, unreadable with the reason, or written with notes."""
    source, target = job
    notes: list[str] = []
    try:
        oldest = max(since, source.stat().st_mtime_ns)
    except OSError as error:  # a link that leads nowhere
        return "unreadable", _reason(source, error)
    try:
        if target.exists() and target.stat().st_mtime_ns >= oldest:
            return "present", ""
        limits: dict[str, Any] = {"max_pixels": max_pixels, "notes": notes}
        resize_short_side_file(source, target, short_side, quality, **limits)
    except DataError as error:
        return "unreadable", " ".join(str(error).split())
    return "written", "; ".join(notes)


def _read(source: str | Path, max_pixels: int, notes: list[str] | None) -> Image.Image:
    given: Any = {"max_pixels": max_pixels, "thorough": True, "notes": notes}
    with open_image(source) as file:
        pixels = decode_file(file, str(source), "rgb", **given)
    red, green, blue = pixels
    if bool((red == green).all()) and bool((red == blue).all()):
        return Image.fromarray(red.numpy())
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _shrink(image: Image.Image, short_side: int) -> Image.Image:
    short = min(image.size)
    if short <= short_side:
        return image
    # Rounded half up in integers, so that the size does not depend on floating point.
    size = [(2 * side * short_side + short) // (2 * short) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
