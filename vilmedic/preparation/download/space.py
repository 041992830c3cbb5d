"""Is there room on the disk?"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from vilmedic.errors import DataError
from vilmedic.preparation.download.errors import NoSpace

SPARE = 2**29  # bytes left over for what runs beside


def check_space(needed: Mapping[Path, int]) -> None:
    """Compare what will be written with what is free, disk by disk.

    Args:
        needed: bytes that will be written into each folder; folders of one disk add up.

    Raises:
        NoSpace: a disk has too little.
        DataError: a file is where a folder is to be.
    """
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in needed.items():
        place = _existing(folder)
        if not place.is_dir():
            raise DataError(f"{place} is a file; {folder} cannot be written there.")
        disk = place.stat().st_dev
        by_disk[disk] = (place, by_disk.get(disk, (place, 0))[1] + size)
    for place, size in by_disk.values():
        free = shutil.disk_usage(place).free
        if size and size + SPARE > free:
            raise NoSpace(
                f"{place} has {readable(free)} free, and {readable(size)} will be written there "
                f"(with {readable(SPARE)} to spare). Make room, choose another disk with --data, "
                "or fetch less with --subset."
            )


def readable(size: float) -> str:
    """A number of bytes as people say it: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _existing(folder: Path) -> Path:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place
