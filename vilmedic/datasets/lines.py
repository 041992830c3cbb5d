"""Line-aligned text files: `<root>/<split>.<file>`, one sample per line; their sentences and words.

Chinese characters, hiragana and the syllables of Thai, Lao, Burmese and Khmer each count as a word,
and so does a run of katakana: without a dictionary there is no better unit, and whole clauses as
words would hardly ever repeat.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

from vilmedic.errors import DataError, nearest
from vilmedic.files import open_regular, plain_name
from vilmedic.log import counted

CHUNK = 2**16  # lines whose offsets are Python integers at a time
SHOWN = 5  # problems of one kind that a message lists; more are counted
LONGEST = 400  # characters of a text in a message
# A name with or without quotation marks, up to the next comma or the end.
_NAME = re.compile(r'\s*(?:"((?:[^"]|"")*)"\s*|([^,]*))(?:,|\Z)')
MIN_WORDS = 2  # shorter sentences ("Stable.") say nothing alone; "No effusion." does
_ABBREVIATIONS = frozenset(
    ["dr", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e", "cf", "approx", "fig", "pt", "pts"]
)
_ENDINGS = frozenset(
    first + last
    for name in _ABBREVIATIONS
    for first in (name[-2], name[-2].upper())
    for last in (name[-1], name[-1].upper())
)
_LOOK_BACK = 40  # characters, more than the longest abbreviation
# Runs of stops match as a whole from their start, so that 100,000 of them are read once. The stops
# of Chinese and Japanese need no space after them.
_STOP = re.compile(
    r"(?<![.!?\u0964\u061f])[.!?\u0964\u061f]+(?![.!?\u0964\u061f])(?=\s|$)"
    r"|[\u3002\uff01\uff1f\uff61]+"
)
_LIST_NUMBER = re.compile(r"(?<!\S)(\d{1,2})\s?[.)]\s+(?=\S)")
_DIGIT = re.compile(r" \d")

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HIRAGANA = "\u3041-\u309f"
_KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_SYLLABLES = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ecf\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d"  # Burmese
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
)
_VOWELS_AND_TONES = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
    "\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d"
    "\u109a-\u109d\u17b4-\u17d3\u17dd"
)
UNSPACED = f"[{_KATAKANA}]+|[{_HAN}{_HIRAGANA}]|[{_SYLLABLES}][{_VOWELS_AND_TONES}]*"
"""A word of a script without spaces, as a regular expression that Python and Oniguruma read."""
_WORD = re.compile(rf"{UNSPACED}|[^\W{_KATAKANA}{_HAN}{_HIRAGANA}{_SYLLABLES}]+")


class Lines(Sequence[str]):
    """The lines of a text, stored as one block of bytes.

    A list of several hundred thousand strings would be copied into every loading process page by
    page, because reading a Python object changes its reference count; one block is shared.

    Args:
        texts: the lines, without line ends.
        path: the file they come from, for messages.
    """

    def __init__(self, texts: Iterable[str], path: Path) -> None:
        self.path = path
        self._bytes = bytearray()
        ends = array("q", [0])
        for text in texts:
            self._bytes += text.encode()
            ends.append(len(self._bytes))
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, line: int) -> str:  # type: ignore[override]
        if not 0 <= line < len(self):
            raise IndexError(line)
        return self._bytes[self._ends[line] : self._ends[line + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), CHUNK):
            for start, end in pairwise(self._ends[first : first + CHUNK + 1].tolist()):
                yield self._bytes[start:end].decode()

    def where(self, line: int) -> str:
        """`file:number` of a line, numbered from 1 as editors do."""
        return f"{self.path}:{line + 1}"


def read_lines(root: str | Path, split: str, file: str) -> Lines:
    """Read `<root>/<split>.<file>`.

    Args:
        root: folder of the data set.
        split: `train`, `validate`, `test` or any other name.
        file: the rest of the file's name, such as `report.tok`.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or has empty lines.
    """
    try:
        plain_name(split)
    except ValueError as error:
        raise DataError(f"The split {split[:60]!r} is no name of a split: {error}.") from None
    path = Path(root) / f"{split}.{file}"
    try:
        with open_regular(path) as stream:
            lines = Lines(_decoded(stream, path), path)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from None
    if not lines:
        raise DataError(f"{path} is empty: one line per sample is expected.")
    empty = [lines.where(int(line)) for line in np.flatnonzero(np.diff(lines._ends) == 0)]
    if empty:
        raise DataError(f"{listed(empty, 'empty line')}. Every line must hold a sample.")
    return lines


def _decoded(stream: IO[bytes], path: Path) -> Iterator[str]:
    r"""Yield the lines of a file, so that it is never in memory as a whole.

    Only "\n" ends a line: str.splitlines would also cut at form feeds and other rare characters.
    """
    for number, raw in enumerate(stream, start=1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not line:  # only a byte order mark
            return
        try:
            yield line.decode().strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number} is not UTF-8 text: byte {line[error.start]:#04x} at position "
                f"{error.start + 1} of the line. Convert the file to UTF-8."
            ) from None


def check_aligned(files: Sequence[Lines]) -> None:
    """Raise a `DataError` unless all files of a split have the same number of lines."""
    first = files[0]
    for other in files[1:]:
        if len(other) != len(first):
            raise DataError(
                f"{first.path} has {counted(len(first), 'line')} and {other.path} has "
                f"{len(other)}: the files of a split hold the same samples, one per line, in the "
                "same order."
            )


def listed(items: Sequence[str], kind: str) -> str:
    """Return `2 empty lines: a, b`, with the first few of many."""
    return f"{counted(len(items), kind)}: {shown(items)}"


def shown(items: Sequence[str], most: int = SHOWN) -> str:
    """Return `a, b`, with the first few of many; very long texts are cut."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(brief(item) for item in items[:most]) + more


def brief(text: str) -> str:
    """Return a text for a message: printable, on one line, and cut if it is long."""
    # A file name may hold bytes that are not UTF-8.
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def split_names(line: str) -> list[str]:
    """The names on a line, separated by commas.

    A name that holds a comma stands in quotation marks, as in CSV: `"scan, left.png",b.png`.
    """
    if '"' not in line:
        return [name for part in line.split(",") if (name := part.strip())]
    names = []
    for quoted, plain in _NAME.findall(line):
        names.append(quoted.replace('""', '"') or plain.strip())
    return [name for name in names if name]


def join_names(names: Sequence[str]) -> str:
    """Join names into one line for `split_names`."""
    return ",".join(_quoted(name) for name in names)


def _quoted(name: str) -> str:
    if "," in name or name[:1] == '"' or name != name.strip():
        return '"' + name.replace('"', '""') + '"'
    return name


def _unreadable(path: Path, error: OSError) -> str:
    """Explain why a file could not be read, with nearby files."""
    if not isinstance(error, FileNotFoundError):
        return f"{path} cannot be read: {error.strerror}."
    folder = path.parent
    if not folder.is_dir():
        return (
            f"{path} does not exist: there is no folder {folder}. Scripts in data/ download and "
            "build data sets; docs/data.md lists them."
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = nearest(path.name, names)
    if not near:
        near = f" The folder holds {', '.join(names[:10]) or 'no files'}."
    return f"{path} does not exist.{near}"


def words(text: str) -> list[str]:
    """Return the words of a text, without punctuation."""
    return _WORD.findall(text)


def split_sentences(report: str) -> list[str]:
    """Split a report into sentences.

    List numbers (`1. ... 2. ...`) separate sentences and are dropped, with or without a full stop
    before them. Decimals (`3.5 cm`) and common abbreviations (`e.g.`, `Dr.`) do not. Texts with
    spaces around punctuation (`clear . no effusion .`) are understood as well. A sentence of fewer
    than two words is joined to the one before it (the first one to its successor).

    Returns:
        The sentences with their closing punctuation, in order; the whole report when it is one.
    """
    sentences: list[str] = []
    parts: list[str] = []  # of the incomplete sentence
    total = 0  # its words
    counts: dict[str, int] = {}  # texts with many pieces often repeat them
    for item in _split_list(report):
        for piece in split_at_stops(item):
            count = counts.get(piece, -1)
            if count < 0:
                counts[piece] = count = len(words(piece))
            if parts and count and min(count, total) >= MIN_WORDS:
                sentences.append(" ".join(parts))
                parts, total = [], 0
            if count:
                parts.append(piece)
                total += count
    return [*sentences, " ".join(parts)] if parts else [report]


def _split_list(report: str) -> list[str]:
    """Cut a report at list numbers that count up from 1; `at grade 2. The` is no list."""
    items, start, expected = [], 0, 1
    for match in _LIST_NUMBER.finditer(report):
        if int(match[1]) != expected:
            continue
        if expected > 1 or _last_sign(report, match.start()) in ("", *".:;!?"):
            items.append(report[start : match.start()])
            start, expected = match.end(), expected + 1
    return [*items, report[start:]]


def _last_sign(text: str, end: int) -> str:
    """Return the last character before a place that is not white space."""
    while end and text[end - 1].isspace():
        end -= 1
    return text[end - 1 : end]


def split_at_stops(text: str) -> list[str]:
    """Cut a text after its stops; pieces may have no words."""
    pieces, start = [], 0
    for match in _STOP.finditer(text):
        first, end = match.span()
        # Few stops need a closer check: after a space or a possible abbreviation.
        if text[first - 2 : first] in _ENDINGS or (first - 1 > start and text[first - 1].isspace()):
            spaced = text[first - 1] == " "
            before = text[max(start, first - _LOOK_BACK) : first].rsplit(None, 1)
            last = before[-1].rstrip().lower() if before else ""
            decimal = spaced and match[0] == "." and last.isdigit() and _DIGIT.match(text, end)
            if decimal or ("." in match[0] and last.lstrip("([") in _ABBREVIATIONS):
                continue
        pieces.append(text[start:end].strip())
        start = end
    pieces.append(text[start:].strip())
    return pieces
