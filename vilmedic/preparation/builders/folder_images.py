"""Matching of image names in a table to the files of a folder."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vilmedic.datasets.lines import brief, shown
from vilmedic.errors import DataError, nearest
from vilmedic.files import open_regular, walk_files
from vilmedic.preparation.command import is_present, names_in
from vilmedic.preparation.folder import Sample
from vilmedic.preparation.splitting import plain_number

SEARCHED = 100_000  # files that are looked at for the place of a missing image
LAST = 2048  # bytes at the end of a file by which copies are looked for first
COPIES = "images of the same content as another one"  # a note of the card
BACKSLASHES, UNICODE, CASE = "backslashes", "Unicode form", "letter case"
NUMBER = "the .0 of a number"
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


@dataclass(frozen=True)
class FoundImage:
    """Result of looking up an image name.

    Attributes:
        name: as the table has it, with its extension.
        path: relative to the folder, as it is on disk when it is there.
        state: `there`, `missing`, or `ambiguous` when it could be several files.
        differs: in what the names in table and folder differ: nothing, or some of `BACKSLASHES`,
            `UNICODE`, `CASE` and `NUMBER`.
    """

    name: str
    path: str
    state: Literal["there", "missing", "ambiguous"]
    differs: tuple[str, ...] = ()


class ImageFolder:
    """A folder of images; each folder in it is listed once.

    Args:
        root: the folder.
        ext: extension of names that are written without one, such as `.png`; empty for none.
    """

    def __init__(self, root: Path, ext: str) -> None:
        self.root, self.ext = root, ext
        self._files: dict[str, bool] = {}  # whether a name that is there is a file
        self._bases = list(dict.fromkeys([os.path.abspath(root), os.path.realpath(root)]))
        self._listed: dict[Path, set[str]] = {}
        self._keyed: dict[Path, dict[str, list[str]]] = {}

    def images(self, values: Iterable[str], where: str = "") -> list[FoundImage]:
        """The images that a row names.

        A value is tried as one name first, commas included, and then as names with commas between
        them.

        Args:
            values: of the row's column.
            where: file and line, for messages.

        Raises:
            DataError: one is not in the folder, or only a part of a list is, so that it may also
                be a name with a comma.
        """
        found = []
        for value in values:
            whole = self.find(value, where)
            parts = [part for name in value.split(",") if (part := name.strip())]
            if whole.state == "there" or len(parts) < 2:
                found.append(whole)
                continue
            several = [self.find(part, where) for part in parts]
            absent = [one.name for one in several if one.state == "missing"]
            if 0 < len(absent) < len(several):
                raise DataError(
                    f"{where}: '{brief(value)}' is no image, and of the images that it lists "
                    f"'{brief(absent[0])}' is not in {self.root}. Correct the list, or put the "
                    "image there."
                )
            found += [whole] if absent else several
        return found

    def find(self, name: str, where: str = "") -> FoundImage:
        """Find the image of a name; one that differs only in form is taken if it is the only one.

        Raises:
            DataError: it does not lie in the folder.
        """
        bare = name
        if self.ext and not name.lower().endswith(self.ext.lower()):
            name += self.ext
        path, differs = self._inside(name, where), []
        if "\\" in name and not self._alike(path):  # a backslash may be part of a name
            path, differs = self._inside(name.replace("\\", "/"), where), [BACKSLASHES]
        if self._holds(path):
            return FoundImage(name, path, "there", tuple(differs))
        alike = self._alike(path)
        same_letters = [other for other in alike if _composed(other) == _composed(path)]
        if not alike and plain_number(bare) != bare:  # the number of an image, as 12.0 for 12
            found = self.find(plain_number(bare), where)
            if found.state == "there":
                return replace(found, name=name, differs=(*found.differs, NUMBER))
        if len(alike) > 1 and len(same_letters) == 1:
            alike = same_letters
        if len(alike) != 1:
            return FoundImage(name, path, "ambiguous" if alike else "missing")
        if _composed(alike[0]) != _composed(path):
            differs.append(CASE)
        if alike[0].casefold() != path.casefold():
            differs.append(UNICODE)
        return FoundImage(name, alike[0], "there", tuple(differs))

    def hint(self, found: FoundImage) -> str:
        """Explain why a name may not be found."""
        name = PurePosixPath(found.path.replace("\\", "/")).name
        place = self.root / PurePosixPath(found.path).parent
        if found.state == "ambiguous":
            alike = self._alike(found.path.replace("\\", "/"))
            if len(alike) > 1:
                return f"Files that fit: {shown(alike)}."
            return f"The file that fits, {', '.join(alike)}, already has its own row."
        if not self.ext and not os.path.splitext(name)[1]:
            ends = sorted(
                {os.path.splitext(n)[1] for n in names_in(place, self._listed) if n != name
                 and os.path.splitext(n)[0] == name}
            )  # fmt: skip
            if ends:
                return f"There is {name}{ends[0]}: give --ext {ends[0]}."
        for number, path in enumerate(walk_files(self.root)):
            if number > SEARCHED:
                break
            if _key(path.name) == _key(name):
                return (
                    f"Paths start from the folder {self.root} (--images), and a file of that name "
                    f"is at {path.relative_to(self.root)}."
                )
        near = nearest(name, sorted(names_in(place, self._listed) - {name})[:1000])
        return f"Paths start from the folder {self.root} (--images).{near}"

    def facts(self, rows: Iterable[Sequence[FoundImage]]) -> dict[str, Any]:
        """Which of the images of some rows are there, for the card."""
        present = sorted({one.path for row in rows for one in row if one.state == "there"})
        content = "".join(f"{path}\n" for path in present).encode(errors="surrogateescape")
        return {"files": len(present), "sha256_of_list": hashlib.sha256(content).hexdigest()}

    def _holds(self, path: str) -> bool:
        """Return whether a file of exactly this name exists."""
        if not path or not is_present(self.root / path, self._listed):
            return False
        if path not in self._files:
            try:
                self._files[path] = stat.S_ISREG(os.stat(self.root / path).st_mode)
            except OSError:  # a link that leads nowhere
                self._files[path] = False
        return self._files[path]

    def _alike(self, path: str) -> list[str]:
        """Files whose paths differ in letter case and Unicode form alone."""
        found = [PurePosixPath()]
        for part in PurePosixPath(path).parts:
            found = [place / name for place in found for name in self._names(place, part)]
        return sorted(str(place) for place in found if self._holds(str(place)))

    def _names(self, place: PurePosixPath, part: str) -> list[str]:
        folder = self.root / place
        if folder not in self._keyed:
            keyed = defaultdict(list)
            for name in names_in(folder, self._listed):
                keyed[_key(name)].append(name)
            self._keyed[folder] = keyed
        return self._keyed[folder].get(_key(part), [])

    def _inside(self, name: str, where: str) -> str:
        path = PurePosixPath(name)
        for base in self._bases:
            if path.is_relative_to(base):
                path = path.relative_to(base)
        if path.is_absolute() or ".." in path.parts or _DRIVE.match(name):
            raise DataError(
                f"{where}{': ' if where else ''}The image '{brief(name)}' does not lie in "
                f"{self.root}: paths start from it, or from /."
            )
        return str(path) if path.parts else ""


def settled(rows: Sequence[Sequence[FoundImage]]) -> list[list[FoundImage]]:
    """The images found, without the ambiguous ones.

    Of two names that differ only in letter case and fit one file, one was another image on a
    case-sensitive disk; the one that is not spelled like the file is then `ambiguous`.
    """
    spelled: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for one in row:
            if one.state == "there":
                name = str(PurePosixPath(one.name.replace("\\", "/")))
                spelled[one.path].add(_composed(name) if CASE in one.differs else one.path)
    return [
        [
            replace(one, state="ambiguous", path=one.name, differs=())
            if CASE in one.differs and len(spelled[one.path]) > 1
            else one
            for one in row
        ]
        for row in rows
    ]


def name_differences(rows: Iterable[Sequence[FoundImage]]) -> dict[str, int]:
    """How many images were found under names that differ in form, by what differs."""
    return dict(Counter(how for row in rows for one in row for how in one.differs))


def same_content(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    """Return images equal byte for byte to another one, each with a digest of its content.

    Only files of one size whose last bytes are the same are read as a whole.

    Args:
        folder: where the paths start.
        paths: of images that are there.
    """
    every = list(dict.fromkeys(paths))

    def size(path: str) -> int:
        return os.path.getsize(folder / path)

    with ThreadPoolExecutor(32) as pool:  # mostly waiting for the disk
        sizes = dict(zip(every, pool.map(size, every), strict=True))
        common = Counter(sizes.values())
        alike = [path for path in every if sizes[path] and common[sizes[path]] > 1]
        last = list(pool.map(lambda path: _last_bytes(folder / path, sizes[path]), alike))
    ends: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for path, end in zip(alike, last, strict=True):
        ends[sizes[path], end].append(path)
    several = [path for group in ends.values() if len(group) > 1 for path in group]
    from vilmedic.datasets.image_source import file_digests  # which loads torch

    digests = file_digests([folder / path for path in several])
    found = {path: digest for path, digest in zip(several, digests, strict=True) if digest}
    seen = Counter(found.values())
    return {path: digest for path, digest in found.items() if seen[digest] > 1}


def patients_together(
    samples: Sequence[Sample], folder: Path | None, notes: dict[str, Any]
) -> list[str]:
    """Return a name for each sample, shared by patients who have an image of the same content.

    Args:
        samples: all of them.
        folder: of the images; without one they cannot be compared.
        notes: receives the names of these images.
    """
    patients = [sample.patient for sample in samples]
    if folder is None:
        return patients
    same = same_content(folder, [path for sample in samples for path in sample.images])
    if not same:
        return patients
    notes[COPIES] = copies(same)
    contents = [[same[path] for path in sample.images if path in same] for sample in samples]
    units = connected([[f"patient {p}", *c] for p, c in zip(patients, contents, strict=True)])
    names: dict[str, str] = {}
    for patient, unit in zip(patients, units, strict=True):
        names.setdefault(unit, patient)
    return [names[unit] for unit in units]


def copies(same: Mapping[str, str]) -> list[str]:
    """`a.png = b.png` for the images of each content."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path, digest in same.items():
        groups[digest].append(path)
    return sorted(" = ".join(sorted(paths)) for paths in groups.values())


def _last_bytes(path: Path, size: int) -> bytes:
    """The end of a file, which differs between compressed images even of one size."""
    with open_regular(path) as file:
        file.seek(max(0, size - LAST))
        return file.read(LAST)


def connected(rows: Sequence[Sequence[str]]) -> list[str]:
    """A name for each row, the same for all rows that share a key directly or by other rows.

    Args:
        rows: the keys of each row, one at least, such as the paths of its images.

    Returns:
        For each row the first key of a row that it is connected with.
    """
    above: dict[str, str] = {}

    def top(key: str) -> str:
        above.setdefault(key, key)
        while above[key] != key:
            above[key] = above[above[key]]  # path compression
            key = above[key]
        return key

    for keys in rows:
        for key in keys:
            above[top(key)] = top(keys[0])
    return [top(keys[0]) for keys in rows]


def repeated_images(rows: Iterable[Sequence[str]]) -> int:
    """How many images are in more than one row."""
    seen = Counter(image for images in rows for image in set(images))
    return sum(number > 1 for number in seen.values())


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _key(name: str) -> str:
    """Normalise a name in letter case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
