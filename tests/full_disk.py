"""Simulate a full disk and paths that are not regular files."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Limit all files of this process to `size` bytes.

    The limit also holds for pytest's own output, so use it only around the lines that need it,
    never as a fixture for a whole test.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def odd_file(path: Path, kind: str) -> Path:
    """Create something at `path` that is not a regular file.

    Args:
        path: where to create it; a device is a link to one.
        kind: `a folder`, `a named pipe`, `a socket` or `a device`.
    """
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        before = Path.cwd()
        os.chdir(path.parent)  # the path of a socket must be short
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.chdir(before)
    else:
        path.symlink_to("/dev/zero")
    return path
