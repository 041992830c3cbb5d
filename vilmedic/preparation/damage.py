"""Archives that are not what was packed."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)
"""What the readers of archives raise for one that is damaged; a `BadGzipFile` is an `OSError`."""
BLOCK = 2**20


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
        with gzip.open(path) as stream:
            while stream.read(BLOCK):
                pass
    with tarfile.open(path) as archive:
        yield archive
