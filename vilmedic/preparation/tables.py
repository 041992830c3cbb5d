"""Tables: CSV, plain or compressed, with columns that must be there and cells that are missing."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from vilmedic.datasets.lines import shown
from vilmedic.errors import DataError, nearest
from vilmedic.files import DAMAGE, from_spreadsheet, walk_files
from vilmedic.preparation.text_file import open_text, unreadable

MISSING = ("nan", "na", "n/a", "none", "null", "<na>", "#n/a", "nat")
"""What a cell without a value says, in small letters: what pandas, R, SQL and Excel write."""
_QUOTED = re.compile('"[^"]*"')
_SEPARATOR = re.compile('"?sep=(.)"?', re.IGNORECASE)  # a first line that Excel writes and reads
_INVISIBLE = "\ufeff\u200b"  # byte order mark and zero-width space, which str.strip leaves
csv.field_size_limit(2**24)  # a whole report with its history fits in a field


class Missing:
    """Which cells have no value: blank ones, and those that hold one of some markers.

    Args:
        markers: texts in any letter case, blanks around them aside.

    Attributes:
        markers: in small letters, sorted.
        counts: missing cells read so far, by column.
    """

    def __init__(self, markers: Iterable[str] = MISSING) -> None:
        self.markers = tuple(sorted({marker.strip().lower() for marker in markers} - {""}))
        self.counts: Counter[str] = Counter()
        self._known = frozenset(self.markers)

    def text(self, value: str, column: str) -> str:
        """A cell without blanks around it; empty, and counted, when it is missing."""
        text = value.strip()
        if text and not text.isascii():
            text = trimmed(text)
        if text and text.lower() not in self._known:
            return text
        self.counts[column] += 1
        return ""

    def is_missing(self, part: str) -> bool:
        """Whether one of several names in a cell is missing; it is not counted."""
        return trimmed(part).lower() in {"", *self._known}


def trimmed(text: str) -> str:
    """A text without blanks and invisible characters around it."""
    text = text.strip()
    while text and (text[0] in _INVISIBLE or text[-1] in _INVISIBLE):
        text = text.strip(_INVISIBLE).strip()
    return text


def find_table(folder: Path, name: str) -> Path:
    """The table `name` in a folder, compressed or not.

    Args:
        folder: where it lies.
        name: its published name, with or without `.gz`.

    Raises:
        DataError: neither form is there.
    """
    plain = name.removesuffix(".gz")
    for candidate in (folder / f"{plain}.gz", folder / plain):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{folder} holds neither {plain}.gz nor {plain}.{_near_files(folder, plain)} "
        "Get it with data/download.py, or say where it is."
    )


def read_table(
    path: Path, columns: Sequence[str], missing: Missing | None = None
) -> Iterator[tuple[str, ...]]:
    """The rows of a CSV file, as the values of some of its columns; see `read_numbered`."""
    for _, values in read_numbered(path, columns, missing):
        yield values


def read_numbered(
    path: Path, columns: Sequence[str], missing: Missing | None = None, encoding: str = ""
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The rows of a CSV file, each with the number of the line on which it starts.

    Fields are separated by commas, semicolons, tabs or bars, as the header is or as a first line
    `sep=;` says. Blank lines are passed over.

    Args:
        path: the file; a compressed one is uncompressed on the way.
        columns: names of the columns to read, in the order of the result.
        missing: which cells have no value, `MISSING` by default; counts them.
        encoding: of the text; empty to find out.

    Yields:
        The line, from 1, and one tuple of stripped texts, empty where a cell is missing.

    Raises:
        DataError: the file cannot be read, lacks a column or has it twice, or has a row of another
            width.
    """
    missing = Missing() if missing is None else missing
    line = 1
    try:
        with open_text(path, encoding) as file:
            header, reader, before = _start(file)
            picked = _positions(path, header, columns)
            named = list(zip(picked, columns, strict=True))
            width = len(header)
            line = before + reader.line_num + 1
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    if len(row) != width:
                        raise DataError(
                            f"{path}:{line} has {len(row)} fields; the header has {width}."
                        )
                    yield (
                        line,
                        tuple([missing.text(from_spreadsheet(row[n]), name) for n, name in named]),
                    )
                line = before + reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line} cannot be read as a row: {error}. A quotation mark that opens a field "
            "must close it, and one within a field is written twice."
        ) from None
    except (OSError, UnicodeDecodeError, *DAMAGE) as error:
        raise unreadable(path, error) from None


def table_columns(path: Path, encoding: str = "") -> list[str]:
    """The names of the columns of a CSV file."""
    try:
        with open_text(path, encoding) as file:
            return _start(file)[0]
    except (OSError, UnicodeDecodeError, csv.Error, *DAMAGE) as error:
        raise unreadable(path, error) from None


def list_facts(folder: Path) -> dict[str, Any]:
    """Number, size and sum of the list of a folder's files: a different file, a different sum."""
    files, total, digest = 0, 0, hashlib.sha256()
    for path in walk_files(folder):
        size = path.stat().st_size
        files, total = files + 1, total + size
        digest.update(f"{path.relative_to(folder)}\t{size}\n".encode())
    return {"files": files, "bytes": total, "sha256_of_list": digest.hexdigest()}


def _positions(path: Path, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    picked = []
    for name in columns:
        places = [place for place, known in enumerate(header) if known == name]
        if not places:
            raise no_column(path, name, header)
        if len(places) > 1:
            numbers = shown([str(place + 1) for place in places])
            raise DataError(
                f"{path} has {len(places)} columns named '{name}' (columns {numbers}), and they "
                "may hold different things. Rename all but the one that is meant."
            )
        picked += places
    return picked


def no_column(path: Path, name: str, known: Sequence[str]) -> DataError:
    """What to raise for a column that a table does not have."""
    has = shown(known) if known else "no header at all"
    return DataError(f"{path} has no column '{name}'. It has {has}.{nearest(name, known)}")


def _near_files(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f" There is no folder {folder}."
    return nearest(name, [path.name for path in folder.iterdir()])


def _start(file: Iterable[str]) -> tuple[list[str], Any, int]:
    """The header of a CSV file, the reader of its rows, and how many lines are before its header.

    Commas, semicolons, tabs or bars separate fields, whichever the header has most of.
    """
    lines = iter(file)
    before, mark = 0, ""
    for first in lines:
        said = _SEPARATOR.fullmatch(first.rstrip("\r\n")) if before == 0 else None
        if said is None and first.strip():
            mark = mark or max(",;\t|", key=_QUOTED.sub("", first).count)
            # Strict: a quotation mark that is not closed would swallow the rows that follow.
            reader = csv.reader(
                chain([first], lines), delimiter=mark, strict=True, skipinitialspace=True
            )
            return [name.strip() for name in next(reader)], reader, before
        mark = said[1] if said else mark
        before += 1
    return [], csv.reader([]), before
