"""The images that the rows of a table name, and which of them are in a folder."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vilmedic.errors import DataError
from vilmedic.preparation.command import is_present, names_in


class ImageFolder:
    """A folder of images; each folder in it is listed once.

    Args:
        root: the folder.
        ext: what names end in that are written without it, such as `.png`; empty for none.
    """

    def __init__(self, root: Path, ext: str) -> None:
        self.root, self.ext = root, ext
        self._bases = list(dict.fromkeys([os.path.abspath(root), os.path.realpath(root)]))
        self._listed: dict[Path, set[str]] = {}
        self._lowered: dict[Path, dict[str, str]] = {}

    def paths(self, values: Iterable[str]) -> list[str]:
        """The images that a row names, each relative to the folder and written in one way.

        Raises:
            DataError: one does not lie in the folder.
        """
        names = [name.strip() for value in values for name in value.split(",")]
        return [self._inside(name) for name in names if name]

    def holds(self, path: str) -> bool:
        """Whether an image is there."""
        return is_present(self.root / path, self._listed)

    def holds_in_other_case(self, path: str) -> bool:
        """Whether it is there under a name that differs in small and capital letters alone."""
        place = self.root
        for part in PurePosixPath(path).parts:
            names = names_in(place, self._listed)
            if place not in self._lowered:
                self._lowered[place] = {name.lower(): name for name in names}
            found = self._lowered[place].get(part.lower())
            if found is None:
                return False
            place = place / (part if part in names else found)
        return True

    def facts(self, rows: Iterable[Sequence[str]]) -> dict[str, Any]:
        """Which of the images of some rows are there, for the card."""
        present = sorted({path for paths in rows for path in paths if self.holds(path)})
        content = "".join(f"{path}\n" for path in present).encode()
        return {"files": len(present), "sha256_of_list": hashlib.sha256(content).hexdigest()}

    def _inside(self, name: str) -> str:
        if self.ext and not name.lower().endswith(self.ext.lower()):
            name += self.ext
        path = PurePosixPath(name)
        for base in self._bases:
            if path.is_relative_to(base):
                path = path.relative_to(base)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"The image '{name}' does not lie in {self.root}: paths start from it, or from /."
            )
        return str(path)


def groups_of_images(rows: Sequence[Sequence[str]]) -> list[str]:
    """A name for each row, the same for all rows that are connected by images of theirs.

    Args:
        rows: the images of each row, one at least.
    """
    above: dict[str, str] = {}

    def top(image: str) -> str:
        above.setdefault(image, image)
        while above[image] != image:
            above[image] = above[above[image]]  # keeps the way short
            image = above[image]
        return image

    for images in rows:
        for image in images:
            above[top(image)] = top(images[0])
    return [top(images[0]) for images in rows]


def repeated_images(rows: Iterable[Sequence[str]]) -> int:
    """How many images are in more than one row."""
    seen = Counter(image for images in rows for image in set(images))
    return sum(number > 1 for number in seen.values())
