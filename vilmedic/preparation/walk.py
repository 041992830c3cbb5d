"""The files below a folder, also those behind links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def is_apple_double(path: Path) -> bool:
    """Whether a file is what macOS keeps beside `x.jpg` on other disks, as `._x.jpg`: no image."""
    return path.name.startswith("._")


def walk_files(
    folder: Path,
    failed: Callable[[OSError], object] | None = None,
    above: frozenset[str] = frozenset(),
) -> Iterator[Path]:
    """All that is no folder below a folder, by name, the files of a folder before its folders.

    Links to folders are followed, for images often lie on another disk; one that leads back to a
    folder above it is left out. Links that lead nowhere are among the files.

    Args:
        folder: where to start; none is there without any files.
        failed: called with the error of each folder that cannot be listed.
        above: the real paths of the folders above it.
    """
    real = os.path.realpath(folder)
    level = next(os.walk(folder, onerror=failed), None)
    if level is None or real in above:
        return
    _, folders, names = level
    for name in sorted(names):
        yield folder / name
    for name in sorted(folders):
        yield from walk_files(folder / name, failed, above | {real})
