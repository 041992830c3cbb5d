"""Rows of any data set: out of a CSV or JSONL file, or of the headers of DICOM files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vilmedic.datasets.dicom import is_dicom
from vilmedic.errors import DataError, nearest
from vilmedic.preparation.command import cores
from vilmedic.preparation.tables import open_text, read_table, table_columns, unreadable
from vilmedic.preparation.walk import walk_files

Row = dict[str, list[str]]
"""Of each column, its values in a row: one, or several out of a list in JSONL or a header."""

# Keys of a row of a DICOM file that gives no sample.
UNREADABLE, NO_PICTURE = "unreadable", "no picture"
CHUNK = 200
_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})


def columns_of(path: Path) -> list[str]:
    """The names of the columns of a CSV or JSONL file, those of the first object in the latter."""
    if not _is_jsonl(path):
        return table_columns(path)
    for _, row in _objects(path):
        return list(row)
    return []


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV or JSONL file (either may be `.gz`).

    Raises:
        DataError: the file cannot be read or has no such column.
    """
    if not _is_jsonl(path):
        for values in read_table(path, columns):
            yield {
                name: [value] if value else [] for name, value in zip(columns, values, strict=True)
            }
        return
    known = columns_of(path)
    for name in columns:
        if name not in known:
            raise DataError(
                f"{path} has no key '{name}'. Its first line has {', '.join(known) or 'none'}."
                f"{nearest(name, known)}"
            )
    for where, row in _objects(path):
        yield {name: _texts(row.get(name), where, name) for name in columns}


def read_headers(folder: Path, keywords: Sequence[str], workers: int = 0) -> Iterator[Row]:
    """The header fields of every DICOM file below a folder, in the order of their paths.

    DICOM files are those that are named so and those that bear the mark of the format.

    Args:
        folder: where to look.
        keywords: standard names of fields, such as `PatientID`; the key "" of each row holds the
            path of the file, `UNREADABLE` the reason when its header cannot be read, and
            `NO_PICTURE` is there when the file holds none.
        workers: processes, 0 for one a core.

    Raises:
        DataError: pydicom is not installed, a keyword is not in the standard, or nothing is there.
    """
    _check_keywords(keywords)
    paths = [str(path.relative_to(folder)) for path in walk_files(folder) if _is_dicom(path)]
    if not paths:
        raise DataError(f"{folder} holds no DICOM file.")
    read = partial(_read_header, folder, tuple(keywords))
    workers = min(cores(workers), -(-len(paths) // CHUNK))
    if workers <= 1:
        yield from map(read, paths)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(read, paths, chunksize=CHUNK)


def _is_dicom(path: Path) -> bool:
    try:
        return is_dicom(path)
    except OSError:
        return True  # to be counted as a file that cannot be read


def _read_header(folder: Path, keywords: Sequence[str], path: str) -> Row:
    pydicom = _pydicom()
    pixels = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in _PIXELS:
            pixels.append(length)
        return tag in _PIXELS

    tags = [pydicom.tag.Tag(name) for name in (*keywords, "Rows")]
    row: Row = {"": [path], **{name: [] for name in keywords}}
    try:
        with open(folder / path, "rb") as file:
            header = pydicom.filereader.read_partial(file, at_pixels, specific_tags=tags)
        for name in keywords:
            value = header.get(name)
            several = value if isinstance(value, pydicom.multival.MultiValue) else [value]
            row[name] = [text for one in several if (text := _text(one))]
    except Exception as error:  # damaged files raise all sorts of things
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "unreadable"
        return row | {UNREADABLE: [reason]}
    if not any(pixels) or "Rows" not in header:
        row[NO_PICTURE] = []
    return row


def _check_keywords(keywords: Sequence[str]) -> None:
    known = _pydicom().datadict.keyword_dict
    for name in keywords:
        if name not in known:
            raise DataError(f"'{name}' is no DICOM field.{nearest(name, known)}")


def _pydicom() -> Any:
    try:
        return importlib.import_module("pydicom")
    except ImportError:
        raise DataError(
            "Reading DICOM headers needs pydicom: pip install 'vilmedic[dicom]'."
        ) from None


def _is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where} is not JSON: {error}.") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where} is not a JSON object but {type(row).__name__}.")
                yield where, row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None


def _texts(value: Any, where: str, name: str) -> list[str]:
    if isinstance(value, dict):
        raise DataError(f"{where}: '{name}' holds an object; a text, number or list is expected.")
    several = value if isinstance(value, list) else [value]
    return [text for one in several if (text := _text(one))]


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
