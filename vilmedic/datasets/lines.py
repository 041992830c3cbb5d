"""Line-aligned text files: `<root>/<split>.<file>`, one sample per line."""

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

CHUNK = 2**16  # lines whose places are Python numbers at a time
SHOWN = 5  # problems of one kind that a message lists before it only counts
LONGEST = 400  # letters of a text in a message
# A name in quotation marks, or one without; up to the comma behind it or the end.
_NAME = re.compile(r'\s*(?:"((?:[^"]|"")*)"\s*|([^,]*))(?:,|\Z)')


class Lines(Sequence[str]):
    """The lines of a text, held as one block of bytes.

    A list of a few hundred thousand strings would be copied into every loading process page by
    page, as reading a Python object writes its reference count; one block is shared.

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
        raise DataError(f"{path} is empty: one line a sample is expected.")
    empty = [lines.where(int(line)) for line in np.flatnonzero(np.diff(lines._ends) == 0)]
    if empty:
        raise DataError(f"{listed(empty, 'empty line')}. Every line must hold a sample.")
    return lines


def _decoded(stream: IO[bytes], path: Path) -> Iterator[str]:
    r"""The lines of a file, one at a time, so that the file is never in memory as a whole.

    Only "\n" ends a line: str.splitlines would also cut at form feeds and other rare characters.
    """
    for number, raw in enumerate(stream, start=1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not line:  # nothing but a byte order mark
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
                f"{first.path} has {len(first)} lines and {other.path} has {len(other)}: the files "
                "of a split hold the same samples, one a line, in the same order."
            )


def listed(items: Sequence[str], kind: str) -> str:
    """`2 empty lines: a, b`, or the first few of many."""
    return f"{len(items)} {kind}{'' if len(items) == 1 else 's'}: {shown(items)}"


def shown(items: Sequence[str], most: int = SHOWN) -> str:
    """`a, b`, or the first few of many; of a very long text its beginning."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(brief(item) for item in items[:most]) + more


def brief(text: str) -> str:
    """A text for a message: on one line, cut when it is as long as a report, and printable."""
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
    """Names as one line that `split_names` takes apart again."""
    return ",".join(_quoted(name) for name in names)


def _quoted(name: str) -> str:
    if "," in name or name[:1] == '"' or name != name.strip():
        return '"' + name.replace('"', '""') + '"'
    return name


def _unreadable(path: Path, error: OSError) -> str:
    """Say why a file could not be read, and what lies near it."""
    if not isinstance(error, FileNotFoundError):
        return f"{path} cannot be read: {error.strerror}."
    folder = path.parent
    if not folder.is_dir():
        return f"{path} does not exist: there is no folder {folder}."
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = nearest(path.name, names)
    if not near:
        near = f" The folder holds {', '.join(names[:10]) or 'no files'}."
    return f"{path} does not exist.{near}"
