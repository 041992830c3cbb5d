"""What files and disks do to a program: one that is full, and paths that lead to no file."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes.

    A test's own output may be such a file: the limit holds for the lines that need it, never for
    a whole test, whose result is written while its fixtures still stand.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def odd_file(path: Path, kind: str) -> Path:
    """A folder, a named pipe, a socket or a device, as near to `path` as it may be.

    Args:
        path: where it is made; a device is a link to one.
        kind: `a folder`, `a named pipe`, `a socket` or `a device`.
    """
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        before = Path.cwd()
        os.chdir(path.parent)  # the name of a socket may only be short
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.chdir(before)
    else:
        path.symlink_to("/dev/zero")
    return path
