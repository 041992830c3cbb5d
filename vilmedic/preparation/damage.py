"""Archives that are not what was packed."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
"""What the readers of archives raise for one that is damaged or that they cannot read; a
`BadGzipFile` is an `OSError`."""
BLOCK = 2**20
MOST_PACKED = 200
"""Times its size that a compressed archive may unpack to: text packs to a tenth, images not at all,
and zeros that are there to fill a disk to a thousandth."""


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
