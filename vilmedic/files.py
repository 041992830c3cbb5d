"""File helpers: atomic writes, checksums, directory walks, archives, full disks, safe names."""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
import math
import os
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

LONGEST_NAME = 255  # bytes of a file name on the usual file systems
BLOCK = 2**20  # bytes that are read at a time
FULL = (errno.ENOSPC, errno.EDQUOT)
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    # zipfile: a member with a password (RuntimeError), of a method that it does not know
    # (NotImplementedError, which is one), or with impossible numbers in its header
    RuntimeError,
    ValueError,
    OverflowError,
)
"""Errors that archive readers raise for damaged or unreadable archives; a
`BadGzipFile` is an `OSError`."""
MOST_PACKED = 200
"""Largest ratio to which an archive may unpack: text packs to a tenth, images not at all,
and zeros that are there to fill a disk to a thousandth."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading, and refuse pipes and devices.

    Opening a named pipe blocks until someone writes to it, and a device may never end.

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
    """Return what a path is if not a file, such as `a named pipe`, which could block when opened.

    Returns:
        None for a file, and for a path that leads to nothing or that the system refuses.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return _KINDS.get(stat.S_IFMT(mode))


@contextmanager
def replacing(path: Path, writer: str = "", *, sync: bool = False) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` at the end of the block.

    The file is either the old one or the whole new one; after an error it is the old one.

    Args:
        path: the file.
        writer: identifies a writer among those of the same file at the same time.
        sync: bring the content to the disk before the old file goes.

    Yields:
        One name for all attempts: what a killed one has left is overwritten by the next.
    """
    draft = path.with_name(f".{path.name}{writer}.tmp")
    try:
        yield draft
        if sync:
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def replace_text(path: Path, text: str, writer: str = "") -> None:
    """Write a text file, as UTF-8, so that it is either the old one or the whole new one.

    Raises:
        OSError: it cannot be written; the old file is still there.
    """
    with replacing(path, writer) as draft:
        draft.write_text(text, encoding="utf-8")


def replace_bytes(path: Path, content: bytes, writer: str = "") -> None:
    """Write a file as `replace_text` does."""
    with replacing(path, writer) as draft:
        draft.write_bytes(content)


def identity(path: Path) -> tuple[int, ...] | None:
    """Return values that change when a file is replaced or written; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_apple_double(path: Path) -> bool:
    """Return whether a file is macOS metadata (`._x.jpg` beside `x.jpg`) and not an image."""
    return path.name.startswith("._")


def walk_files(
    folder: Path,
    failed: Callable[[OSError], object] | None = None,
    above: frozenset[str] = frozenset(),
) -> Iterator[Path]:
    """Yield everything below a folder except folders, sorted by name, files before subfolders.

    Links to folders are followed, for images often lie on another disk; one that leads back to a
    folder above it is left out. Links that lead nowhere are among the files.

    Args:
        folder: where to start; none is there without any files.
        failed: called with the error of each folder that cannot be listed.
        above: the real paths of the folders above it.
    """
    real = os.path.realpath(folder)
    level = next(os.walk(folder, onerror=failed), None)
    if level is None or real in above:
        return
    _, folders, names = level
    for name in sorted(names):
        yield folder / name
    for name in sorted(folders):
        yield from walk_files(folder / name, failed, above | {real})


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to the disk, where the file system can."""
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


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a `.tgz` or `.tar`, after its compressed stream was read to the end once.

    `tarfile` takes a damaged header for the end of the archive and stops before the sum at the end
    of the stream, so that members would be missing or wrong without a word.

    Raises:
        tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError: it is damaged; see `DAMAGE`.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if compressed:
        most, unpacked = MOST_PACKED * max(path.stat().st_size, BLOCK), 0
        with gzip.open(path) as stream:
            while block := stream.read(BLOCK):
                unpacked += len(block)
                if unpacked > most:
                    raise tarfile.TarError(f"it unpacks to more than {MOST_PACKED} times its size")
    # Of no other compression, which `tarfile` would find out by itself: it would have no bound.
    with tarfile.open(path, "r:gz" if compressed else "r:") as archive:
        yield archive


def disk_message(error: OSError, where: str = "") -> str:
    """Message for a disk error, with its own sentence for a full disk.

    Args:
        error: what was raised.
        where: the folder written to, where it is known.
    """
    if error.errno not in FULL:
        return str(error)
    disk = f"The disk of {where}" if where else "The disk"
    return f"{disk} is full. What is complete is kept: free space and run the same command again."


def text_table(rows: Sequence[Sequence[str]], between: str = "  ") -> list[str]:
    """The lines of a table: the first column set to the left, the others to the right.

    Args:
        rows: the cells, as many in each row.
        between: what separates two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        between.join(
            [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])],
        ).rstrip()
        for first, *others in rows
    ]


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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def core_count() -> int:
    """Return the number of cores that this process may use.

    Its affinity counts, and the share of time that its control group has, as containers set it.
    """
    affine = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _core_share(Path("/proc/self/cgroup")))))


def _core_share(own: Path, mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores whose time the control groups of this process may use; infinite without a limit.

    Args:
        own: the file that says which groups the process belongs to.
        mounted: where the groups are shown. A container may see its own one as the topmost, under
            whatever name `own` gives it.
    """
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return math.inf
    shares = [math.inf]
    for number, controllers, path in (group for group in groups if len(group) == 3):
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        top = mounted / controllers  # version 2 has one tree, whose line names no controller
        folder = top / path.strip("/")
        while folder.is_relative_to(top):
            shares.append(_quota(folder))
            folder = folder.parent
    return min(shares)


def _quota(group: Path) -> float:
    """Cores whose time a control group of version 2 or 1 may use."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else math.inf
        except (OSError, ValueError):  # not there, or `max`
            continue
    return math.inf
