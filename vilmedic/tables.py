"""Reading of CSV tables in any character set, plain or compressed, with missing cells.

Columns that are asked for must be there. Text is in UTF-8, UTF-16 or an older encoding, which is
found out from all of it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any

from vilmedic.datasets.lines import shown
from vilmedic.encodings import SAMPLES, decode_all, is_western, latin_encoding
from vilmedic.errors import DataError, nearest
from vilmedic.files import BLOCK, DAMAGE, from_spreadsheet, open_regular

MISSING = ("nan", "na", "n/a", "none", "null", "<na>", "#n/a", "nat")
"""Texts of empty cells, in lower case, as written by pandas, R, SQL and Excel."""
_QUOTED = re.compile('"[^"]*"')
_SEPARATOR = re.compile('"?sep=(.)"?', re.IGNORECASE)  # a first line that Excel writes and reads
_INVISIBLE = "\ufeff\u200b"  # byte order mark and zero-width space, which str.strip leaves
csv.field_size_limit(2**24)  # a whole report with its history fits in a field
_NUL = "a NUL character"
GZIP = b"\x1f\x8b"
_WESTERN = "cp1252"  # Latin-1 with what Windows adds to it
# Types of files that are not text, by their first bytes, and the remedy.
_TABLE = "Save it as CSV with UTF-8 (in Excel: Save As, CSV UTF-8)"
_UNPACK = "Unpack it and give the table in it"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (b"\xd0\xcf\x11\xe0", "an Excel file", _TABLE),
    (b"BZh", "compressed with bzip2", _UNPACK),
    (b"\xfd7zXZ\0", "compressed with xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"PAR1", "a Parquet file", "Write it as CSV, with DataFrame.to_csv for instance"),
    (b"\x89HDF", "an HDF5 file", "Write it as CSV, with DataFrame.to_csv for instance"),
    (b"SQLite format 3\0", "an SQLite database", "Write the table of it as CSV"),
    (b"%PDF", "a PDF", "Give the table as CSV"),
    (b"\x80\x04\x95", "a Python pickle", "Write it as CSV, with DataFrame.to_csv for instance"),
)
_WEB = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HIGH = re.compile(rb"[\x80-\xff]+")
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


class Missing:
    """Detects cells without a value: blank ones, and those with one of some markers.

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
        """Return whether one of several names in a cell is missing; it is not counted."""
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


def no_column(path: Path, name: str, known: Sequence[str]) -> DataError:
    """The error for a column that a table does not have."""
    has = shown(known) if known else "no header at all"
    return DataError(f"{path} has no column '{name}'. It has {has}.{nearest(name, known)}")


def open_text(path: Path, encoding: str = "") -> IO[str]:
    """Open a text file, plain or compressed with gzip.

    Args:
        path: the file.
        encoding: of its text; empty to find out, see `encoding_of`.

    Raises:
        DataError: it is no text, or its encoding is unknown.
        OSError: it cannot be read.
    """
    encoding = encoding_of(path, encoding)
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline="")


def encoding_of(path: Path, encoding: str = "") -> str:
    """The encoding of a text file, all of which is read.

    UTF-8 and UTF-16 with and without a byte order mark are recognised for certain. Latin-script
    text is in the character set in which its letters fit a single language, or in Western European
    (cp1252, which includes Latin-1) if they fit several of its languages. Anything else is decoded
    if `encodings.decode_all` is certain, and otherwise refused.

    Args:
        path: the file, plain or compressed with gzip.
        encoding: the known encoding, against which the text is checked.

    Raises:
        DataError: it is no text, or its encoding is unknown or not the one given.
        OSError: it cannot be read.
    """
    at = path.stat()
    return _encoding_of(path, encoding, at.st_size, at.st_mtime_ns)


def unreadable(path: Path, error: Exception) -> DataError:
    """Return the error for a text file that could not be read."""
    reason = str(error) or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        reason = f"it is not {error.encoding} text (byte {byte:#04x})"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return DataError(f"{path} cannot be read: {reason}.")


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


def _near_files(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f" There is no folder {folder}."
    return nearest(name, [path.name for path in folder.iterdir()])


def _start(file: Iterable[str]) -> tuple[list[str], Any, int]:
    """The header of a CSV file, the reader of its rows, and how many lines are before its header.

    Commas, semicolons, tabs or bars separate fields, the most frequent one in the header.
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


def _open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, uncompressed when it holds gzip, whatever its name says."""
    with open_regular(path) as file:
        packed = file.read(2) == GZIP
    return gzip.open(path) if packed else open(path, "rb")  # type: ignore[return-value]


@lru_cache(maxsize=16)
def _encoding_of(path: Path, given: str, size: int, changed: int) -> str:
    """See `encoding_of`; size and time of the last change are there to notice a change."""
    try:
        head = _head(path)
        _refuse_other_kinds(path, head)
        name = given or _first_guess(head)
        fault = _first_fault(path, name)
        if fault is None:
            return name
        if _NUL in fault:
            raise DataError(
                f"{path}:{fault}, which no text does: the file is damaged. Download it again."
            )
        if given:
            raise DataError(f"{path}:{fault}, so it is not {given} text. Give another --encoding.")
        if name == "utf-8":
            name = _legacy_encoding(path)
            if name and _first_fault(path, name) is None:
                return name
    except DAMAGE as error:
        raise unreadable(path, error) from None
    raise DataError(
        f"{path}:{fault}, which is not UTF-8 text, and of unknown encoding. Correct the "
        "line if the rest is UTF-8, or convert the file (data/make_folder.py: or say which it is "
        "with --encoding)."
    )


def _head(path: Path) -> bytes:
    with _open_bytes(path) as file:
        return file.read(2**14)


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    for mark, kind, remedy in _KINDS:
        if head.startswith(mark):
            if b"xl/" in head or path.suffix.lower() in (".xlsx", ".xlsm", ".ods"):
                kind, remedy = "an Excel file", _TABLE
            raise DataError(f"{path} is {kind}, not a text file. {remedy}.")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive, not a text file. {_UNPACK}.")
    if _WEB.match(head):
        raise DataError(
            f"{path} is a web page, such as one that asks to log in, not a table. Get the file "
            "itself."
        )
    with open_regular(path) as file:
        if path.suffix.lower() == ".gz" and file.read(2) != GZIP:
            raise DataError(
                f"{path} is not gzipped, though its name ends in .gz: some programs unpack what "
                f"they download. Rename it to {path.stem}."
            )


def _first_guess(head: bytes) -> str:
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    for part in (head[:64], head):  # a header of ASCII names, or text of many ASCII letters
        even, odd = part[::2].count(0), part[1::2].count(0)
        few, many = len(part) / 40, len(part) / 8
        if odd > many and even <= few:
            return "utf-16-le"
        if even > many and odd <= few:
            return "utf-16-be"
    return "utf-8"


def _first_fault(path: Path, encoding: str) -> str | None:
    """Line and byte that an encoding does not allow, as words that follow `path:`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with _open_bytes(path) as file:
        while True:
            block = file.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                return f"{line} holds the byte {error.object[error.start]:#04x}"
            if "\0" in text:
                return f"{line + text[: text.index(chr(0))].count(chr(10))} holds {_NUL}"
            line += text.count("\n")
            if not block:
                return None


def _legacy_encoding(path: Path) -> str:
    """The encoding of a text that is not UTF-8; empty when it cannot be told.

    Where most bytes above ASCII are UTF-8, the file is UTF-8 with damage. A few accented letters
    leave the encoding open; they stand alone or in pairs between ASCII letters, while those of
    other scripts follow each other.
    """
    alone = long = utf8 = 0
    lines: list[bytes] = []
    with _open_bytes(path) as file:
        for line in file:
            if line.isascii():
                continue
            if len(lines) < SAMPLES:
                lines.append(line)
            for run in _HIGH.findall(line):
                if len(run) > 2:
                    long += len(run)
                else:
                    alone += len(run)
            utf8 += sum(map(len, _UTF8.findall(line)))
    if 2 * utf8 > alone + long:
        return ""
    if alone > 3 * long:
        latin = latin_encoding(b"".join(lines))
        if latin is not None:
            return latin
    found = {(one.encoding, one.doubtful) for one in decode_all(lines)}
    western = alone > 3 * long and is_western(b"".join(lines))
    if len(found) == 1 and not next(iter(found))[1]:
        name = next(iter(found))[0]
        return name if name != _WESTERN or western else ""
    return _WESTERN if western else ""
