"""Published tables: CSV, plain or compressed, with columns that must be there."""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from vilmedic.errors import DataError, nearest
from vilmedic.files import from_spreadsheet
from vilmedic.preparation.damage import DAMAGE
from vilmedic.preparation.walk import walk_files

BLOCK = 2**20
_QUOTED = re.compile('"[^"]*"')
csv.field_size_limit(2**24)  # a whole report with its history fits in a field


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


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The rows of a CSV file, as the values of some of its columns.

    Fields are separated by commas, or by semicolons or tabs when the header is. Blank lines are
    passed over.

    Args:
        path: the file; `.gz` is uncompressed on the way.
        columns: names of the columns to read, in the order of the result.

    Yields:
        One tuple of stripped texts a row.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a row of another width.
    """
    try:
        with open_text(path) as file:
            reader = _reader(file)
            header = [name.strip() for name in next(reader, [])]
            picked = _positions(path, header, columns)
            width = len(header)
            for row in reader:
                if len(row) < 2 and not "".join(row).strip():
                    continue
                if len(row) != width:
                    raise DataError(
                        f"{path}:{reader.line_num} has {len(row)} fields; the header has {width}."
                    )
                yield tuple(from_spreadsheet(row[position].strip()) for position in picked)
    except (OSError, UnicodeDecodeError, csv.Error, *DAMAGE) as error:
        raise unreadable(path, error) from None


def table_columns(path: Path) -> list[str]:
    """The names of the columns of a CSV file."""
    try:
        with open_text(path) as file:
            return [name.strip() for name in next(_reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error, *DAMAGE) as error:
        raise unreadable(path, error) from None


def open_text(path: Path) -> IO[str]:
    """A text file, plain or `.gz`, as UTF-8 with or without a byte order mark."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def unreadable(path: Path, error: Exception) -> DataError:
    """What to raise when reading a text file has failed."""
    reason = str(error) or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        reason = f"it is not UTF-8 text (byte {byte:#04x}). Convert the file to UTF-8"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return DataError(f"{path} cannot be read: {reason}.")


def list_facts(folder: Path) -> dict[str, Any]:
    """Number, size and sum of the list of a folder's files: a different file, a different sum."""
    files, total, digest = 0, 0, hashlib.sha256()
    for path in walk_files(folder):
        size = path.stat().st_size
        files, total = files + 1, total + size
        digest.update(f"{path.relative_to(folder)}\t{size}\n".encode())
    return {"files": files, "bytes": total, "sha256_of_list": digest.hexdigest()}


def _positions(path: Path, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    places = {name: position for position, name in enumerate(header)}
    for name in columns:
        if name not in places:
            raise DataError(
                f"{path} has no column '{name}'. It has {', '.join(header) or 'no header at all'}."
                f"{nearest(name, header)}"
            )
    return [places[name] for name in columns]


def _near_files(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f" There is no folder {folder}."
    return nearest(name, [path.name for path in folder.iterdir()])


def _reader(file: IO[str]) -> Any:
    """The rows of a file; its header tells whether commas, semicolons or tabs separate fields."""
    first = file.readline()
    mark = max(",;\t", key=_QUOTED.sub("", first).count)
    return csv.reader(chain([first], file), delimiter=mark)
