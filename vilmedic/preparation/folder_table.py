"""Rows of any data set: out of a CSV or JSON file, or of the headers of DICOM files."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vilmedic.datasets.dicom import is_dicom, is_marked
from vilmedic.datasets.lines import brief, shown
from vilmedic.encodings import decode_all
from vilmedic.errors import DataError, nearest
from vilmedic.files import DAMAGE, is_apple_double, open_regular, walk_files
from vilmedic.preparation.command import cores
from vilmedic.preparation.folder import LeftOut
from vilmedic.preparation.header_text import header_texts, split_values
from vilmedic.preparation.splitting import SPLIT_NAMES
from vilmedic.tables import Missing, no_column, open_text, read_numbered, unreadable

CHUNK = 200
_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_JSON = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Row:
    """A row of a table, or the header of a DICOM file.

    Attributes:
        where: `file:line` of a table, or the entry of a JSON list.
        values: of each column those that are not missing: one, or several out of a list in JSON or
            a header.
        path: of the DICOM file, relative to its folder.
        split: in which the table itself lists it; empty when it lists no splits.
        encoding: character set of a header that does not say it, found from the texts of all.
        doubtful: whether another character set is as likely.
    """

    where: str
    values: Mapping[str, list[str]] = field(default_factory=dict)
    path: str = ""
    split: str = ""
    encoding: str = ""
    doubtful: bool = False

    @property
    def place(self) -> str:
        """Where it is, without the folder of the file: the same wherever that lies."""
        return "" if self.path else os.path.basename(self.where)

    def text(self, column: str) -> str:
        """The values of a column as one text; empty without a column or a value."""
        return " ".join(self.values[column]) if column else ""


def read_rows(
    path: Path, columns: Sequence[str], missing: Missing, encoding: str = ""
) -> list[Row]:
    """The rows of a CSV file, of JSON lines, or of a JSON file (each may be compressed with gzip).

    A JSON file holds a list of objects, or lists named `train`, `val` and `test` as the
    `annotation.json` of report generation projects does.

    Args:
        path: the file.
        columns: names of the columns, or keys of the objects, to read.
        missing: which values count as missing; counts them.
        encoding: of the text; empty to find out.

    Raises:
        DataError: the file cannot be read or has no such column.
    """
    if not path.name.lower().removesuffix(".gz").endswith(_JSON):
        return [
            Row(
                f"{path}:{line}",
                {
                    name: [value] if value else []
                    for name, value in zip(columns, values, strict=True)
                },
            )
            for line, values in read_numbered(path, columns, missing, encoding)
        ]
    rows = []
    known: dict[str, None] = {}
    for where, split, content in _objects(path, encoding):
        known |= dict.fromkeys(content)
        values = {name: _texts(content.get(name), where, name, missing) for name in columns}
        rows.append(Row(where, values, split=split))
    if not rows:
        raise DataError(f"{path} holds no objects.")
    for name in columns:
        if name not in known:
            raise no_column(path, name, list(known))
    return rows


def read_headers(
    folder: Path,
    keywords: Sequence[str],
    missing: Missing,
    left_out: LeftOut,
    workers: int = 0,
    encoding: str = "",
) -> list[Row]:
    """The header fields of every DICOM file with a picture below a folder, in the order of paths.

    DICOM files are those that are named so and those that bear the mark of the format. They are
    read as in training, also without the 128 bytes before the mark and the mark itself.

    Args:
        folder: where to look.
        keywords: standard names of fields, such as `PatientID`.
        missing: which values count as missing; counts them.
        left_out: is told of the files that give no row.
        workers: processes, 0 for one a core.
        encoding: character set of all texts outside ASCII, whatever the headers declare.

    Raises:
        DataError: pydicom is not installed, a keyword is not in the standard, or nothing is there.
    """
    _check_keywords(keywords)

    def failed(error: OSError) -> None:
        left_out.add("folders that cannot be listed", str(error.filename))

    paths = []
    for path in walk_files(folder, failed):
        name = str(path.relative_to(folder))
        if is_apple_double(path) or not _is_dicom(path):
            left_out.add("files that are no DICOM", name)
        else:
            paths.append(name)
    if not paths:
        raise DataError(f"{folder} holds no DICOM file.")
    read = partial(_read_header, folder, tuple(keywords), encoding)
    workers = min(cores(workers), -(-len(paths) // CHUNK))
    if workers <= 1:
        headers = list(map(read, paths))
    else:
        with get_context("spawn").Pool(workers) as pool:
            headers = list(pool.imap(read, paths, chunksize=CHUNK))
    # Texts whose character set is not known are told by the texts of all files together.
    unclear = [content for header in headers for content in header.unclear.values()]
    decoded = iter(decode_all(unclear) if unclear else ())
    rows = []
    for name, header in zip(paths, headers, strict=True):
        values, found, doubtful = dict(header.values), "", False
        for keyword in header.unclear:
            one = next(decoded)
            values[keyword] = split_values(one.text, keyword)
            found, doubtful = one.encoding, doubtful or one.doubtful
        if header.reason:
            left_out.add(header.reason, name, where=header.detail)
            continue
        kept = {
            keyword: [text for one in several or [""] if (text := missing.text(one, keyword))]
            for keyword, several in values.items()
        }
        rows.append(Row(str(folder / name), kept, name, encoding=found, doubtful=doubtful))
    return rows


def _is_dicom(path: Path) -> bool:
    try:
        return is_dicom(path)
    except OSError:
        return True  # to be named as a file that cannot be read


@dataclass(frozen=True)
class _Header:
    """The fields of a file, those of an unknown character set as bytes; or why it is left out."""

    values: dict[str, list[str]] = field(default_factory=dict)
    unclear: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""
    detail: str = ""


def _read_header(folder: Path, keywords: Sequence[str], encoding: str, path: str) -> _Header:
    pydicom = _pydicom()
    pixels = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in _PIXELS:
            pixels.append(length)
        return tag in _PIXELS

    tags = [pydicom.tag.Tag(name) for name in (*keywords, "Rows")]
    values: dict[str, list[str]] = {}
    unclear: dict[str, bytes] = {}
    try:
        with open_regular(folder / path) as file:
            marked = is_marked(file.read(132))
            file.seek(0)
            header = pydicom.filereader.read_partial(
                file, at_pixels, force=not marked, specific_tags=tags
            )
        for name in keywords:
            values[name], content = header_texts(header, name, encoding)
            if content is not None:
                unclear[name] = content
    except Exception as error:  # damaged files raise all sorts of things
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return _Header(reason="DICOM files that cannot be read", detail=brief(lines[0]))
    if any(pixels) and "Rows" in header:
        return _Header(values, unclear)
    if marked:
        return _Header(reason="DICOM files without a picture")
    return _Header(
        reason="DICOM files that cannot be read", detail="no picture in it, or it ends too early"
    )


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
            "Reading DICOM headers needs pydicom: pip install '.[dicom]' in the clone."
        ) from None


def _objects(path: Path, encoding: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Where each object of a JSON file is, its split when the file lists splits, and the object."""
    try:
        with open_text(path, encoding) as file:
            first = next((line for line in file if line.strip()), "")
            # One object a line, unless the first line is the beginning of something longer.
            lined = not path.name.lower().removesuffix(".gz").endswith(".json")
            in_lines = first.lstrip().startswith("{") and _is_row(first, lined)
            file.seek(0)
            if in_lines:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        where = f"{path}:{number}"
                        yield where, "", _object(_parsed(line.rstrip("\r\n"), path, number), where)
                return
            content = _parsed(file.read(), path, 1)
    except (OSError, UnicodeDecodeError, *DAMAGE) as error:
        raise unreadable(path, error) from None
    if isinstance(content, list):
        for number, one in enumerate(content, start=1):
            where = f"{path}: entry {number}"
            yield where, "", _object(one, where)
        return
    if not _lists_splits(content):
        keys = shown([f"'{key}'" for key in content]) if isinstance(content, dict) else "no keys"
        raise DataError(
            f"{path} is JSON with {keys}, not a list of objects. Write one object a line (in "
            "pandas: to_json(path, orient='records', lines=True)), a list of objects, or lists "
            "named train, val and test."
        )
    for name, entries in content.items():
        for number, one in enumerate(entries, start=1):
            where = f"{path}: {name}, entry {number}"
            yield where, SPLIT_NAMES[name.lower()], _object(one, where)


def _is_row(line: str, lined: bool) -> bool:
    """Whether a first line is an object of its own, as the name of the file may say (`lined`)."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return lined
    return isinstance(content, dict) and not _lists_splits(content)


def _lists_splits(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(name.lower() in SPLIT_NAMES for name in content)
        and all(isinstance(entries, list) for entries in content.values())
        and all(isinstance(one, dict) for entries in content.values() for one in entries[:1])
    )


def _parsed(text: str, path: Path, line: int) -> Any:
    """The content of a JSON text that starts on a line of a file."""
    try:
        return json.loads(text.lstrip("\ufeff"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise DataError(
            f"{path}:{at} is not JSON: {error.msg} at character {error.colno}."
        ) from None
    except RecursionError:
        raise DataError(f"{path}:{line} is JSON of too many levels.") from None
    except ValueError as error:
        raise DataError(f"{path}:{line} is not JSON: {error}.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key '{brief(twice)}' twice")
    return found


def _object(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DataError(f"{where} is not a JSON object but {type(content).__name__}.")
    return content


def _texts(value: Any, where: str, name: str, missing: Missing) -> list[str]:
    """The values of a key that are not missing; a list without any counts as one missing value."""
    if not value and isinstance(value, list):
        missing.counts[name] += 1
    several = value if isinstance(value, list) else [value]
    texts = []
    for one in several:
        if isinstance(one, dict | list):
            raise DataError(
                f"{where}: '{name}' holds {'an object' if isinstance(one, dict) else 'lists'}; a "
                "text, a number or a list of them is expected."
            )
        nothing = one is None or (isinstance(one, float) and math.isnan(one))
        text = missing.text("" if nothing else str(one), name)
        if not text.isascii() and _broken(text):
            raise DataError(f"{where}: '{name}' holds half a character (a lone surrogate).")
        if text:
            texts.append(text)
    return texts


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
