"""Files that are whole at any moment, what a path leads to, and names that stay in a folder."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

LONGEST_NAME = 255  # bytes of a file name on the usual file systems
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file to read it, and nothing else that may have its name.

    Opening a named pipe waits for somebody who writes to it, and a device may give data for ever.

    Args:
        path: the file; links are followed.

    Raises:
        OSError: it cannot be read, or is no regular file, which `strerror` then says.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)  # before opening, which has effects on some devices
    if kind != stat.S_IFREG:
        raise OSError(
            errno.EINVAL, f"it is {_KINDS.get(kind, 'of another kind')}, not a file", path
        )
    return open(path, "rb")


def confined(folder: Path, name: str) -> Path:
    """The path in a folder of a name that comes from outside: an archive, an index, a label.

    Args:
        folder: the folder that must not be left.
        name: a relative path, with `/` or `\\` between its parts.

    Raises:
        ValueError: the name leads out of the folder, or is none that a file can have; says why.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise ValueError("it holds control characters")
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive:
        raise ValueError("it would be written outside its folder")
    if not path.name:
        raise ValueError("it is empty")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise ValueError(f"a part of it is longer than {LONGEST_NAME} bytes")
    return folder / path


def plain_name(name: str) -> str:
    """A name from outside that is that of a file in a folder, not of one further down.

    Raises:
        ValueError: it is not; says why.
    """
    if len(confined(Path(), name).parts) != 1 or set(name) & {"/", "\\"}:
        raise ValueError("it holds a folder")
    return name


def no_file(path: Path) -> str | None:
    """What a path leads to instead of a file, `a named pipe` say, whose opening might never end.

    Returns:
        None for a file, and for a path that leads to nothing or that the system refuses.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return _KINDS.get(stat.S_IFMT(mode))


def replace_text(path: Path, text: str, writer: str = "") -> None:
    """Write a text file so that it is either the old one or the whole new one.

    Args:
        path: the file.
        text: its content, written as UTF-8.
        writer: what tells writers apart that may be at the same file at the same time.

    Raises:
        OSError: it cannot be written; the old file is still there.
    """
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), writer)


def replace_bytes(path: Path, content: bytes, writer: str = "") -> None:
    """Write a file as `replace_text` does."""
    _replace(path, lambda temporary: temporary.write_bytes(content), writer)


def _replace(path: Path, write: Callable[[Path], object], writer: str) -> None:
    # One name for all attempts: what a killed one has left is overwritten by the next.
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system has a way to."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def spreadsheet_text(text: str) -> str:
    """A text cell of a CSV file that is written, so that no spreadsheet runs it as a formula.

    Spreadsheets take what begins with one of `= + - @` (or a tab or a return before it) for a
    formula. An apostrophe in front marks it as text; numbers stay as they are.
    """
    if not text.startswith(_FORMULA) or _is_number(text):
        return text
    return f"'{text}"


def from_spreadsheet(text: str) -> str:
    """A text cell of a CSV file that is read, without the mark of `spreadsheet_text`."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def core_count() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
