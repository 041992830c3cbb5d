"""The images of MIMIC-CXR-JPG: which there are, and one of them from the server to its folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vilmedic.errors import ConfigError, DataError, nearest
from vilmedic.preparation.command import is_present
from vilmedic.preparation.download.answers import Job
from vilmedic.preparation.download.table import Images
from vilmedic.preparation.download.transfer import Transfer, disk_error
from vilmedic.preparation.mimic_cxr import image_path
from vilmedic.preparation.resize import resize_short_side_file
from vilmedic.preparation.splitting import SPLITS
from vilmedic.preparation.tables import read_table

_SUM = re.compile(r"([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?(.+)")


@dataclass(frozen=True)
class Subset:
    """The studies to fetch the images of.

    Attributes:
        split: of one split only; empty for all.
        first: only so many studies, in the order of the table; None for all.
    """

    split: str = ""
    first: int | None = None


@dataclass(frozen=True)
class ImageJob:
    """One image.

    Attributes:
        name: its path in the release.
        original: what to fetch.
        target: where the smaller image goes.
    """

    name: str
    original: Job
    target: Path


def parse_subset(text: str) -> Subset:
    """A subset out of `500`, `validate` or `validate:500`.

    Raises:
        ConfigError: it is none of these.
    """
    split, colon, number = text.rpartition(":")
    if not colon and not number.isdecimal():
        split, number = text, ""
    if split and split not in SPLITS:
        raise ConfigError(
            f"--subset {text}: '{split}' is no split; allowed are a number of studies, "
            f"{', '.join(SPLITS)}, or both such as validate:500.{nearest(split, SPLITS)}"
        )
    if (number or colon) and (not number.isdecimal() or int(number) == 0):
        raise ConfigError(f"--subset {text}: '{number}' is no number of studies.")
    return Subset(split, int(number) if number else None)


def list_images(split_table: Path, subset: Subset) -> list[str]:
    """The paths of the images of a subset, in the order of the table of splits."""
    chosen: set[str] = set()
    names = []
    columns = ["subject_id", "study_id", "split", "dicom_id"]
    for patient, study, split, dicom in read_table(split_table, columns):
        if subset.split and split != subset.split:
            continue
        if study not in chosen:
            if subset.first is not None and len(chosen) >= subset.first:
                continue
            chosen.add(study)
        names.append(image_path(patient, study, dicom))
    if not names:
        raise DataError(f"{split_table} lists no image of the split '{subset.split}'.")
    return names


def read_sums(path: Path, wanted: set[str]) -> dict[str, str]:
    """The published sums of some files, out of a `SHA256SUMS.txt`."""
    sums = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                found = _SUM.fullmatch(line.strip())
                if found and found[2] in wanted:
                    sums[found[2]] = found[1].lower()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    return sums


def image_jobs(
    images: Images, names: list[str], sums: dict[str, str], data: Path, target: Path, page: str
) -> Iterator[ImageJob]:
    """What is to be done for each image, made one by one: there are hundreds of thousands.

    Raises:
        DataError: an image has no published sum.
    """
    for name in names:
        if name not in sums:
            raise DataError(f"{images.sums} has no sum of {name}: table and sums do not agree.")
        path = data / images.originals / name
        job = Job(images.base.rstrip("/") + "/" + name, path, sha256=sums[name], page=page)
        yield ImageJob(name, job, target / name)


def not_done(names: list[str], target: Path, originals: Path | None) -> list[str]:
    """The images that were not fetched and made smaller before.

    Args:
        names: paths in the release.
        target: folder of the smaller images.
        originals: folder of the originals, when these are to be kept.
    """
    listed: dict[Path, set[str]] = {}
    folders = [target] if originals is None else [target, originals]
    return [
        name for name in names if not all(is_present(place / name, listed) for place in folders)
    ]


def fetch_image(transfer: Transfer, images: Images, job: ImageJob, *, keep: bool) -> None:
    """Fetch an image, make it smaller, and drop the original unless it is to be kept."""
    transfer.fetch(job.original)
    try:
        if not job.target.is_file():
            resize_short_side_file(job.original.path, job.target, images.short_side, images.quality)
        if not keep:
            job.original.path.unlink()
    except OSError as error:
        raise disk_error(job.target, error) from error
