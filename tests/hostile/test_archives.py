"""Untrusted archives are unpacked completely into their folder or refused with a message."""

from __future__ import annotations

import io
import random
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest

from tests.hostile.table import Table
from vilmedic.preparation.download.jobs import unpack

ARCHIVES = 40
MOST = 2_000_000  # expected unpacked size in bytes
NAMES = (
    "a.png",
    "deep/er/b.png",
    "../evil",
    "/tmp/evil-of-a-test",
    "..\\evil",
    "C:evil",
    "1.png/x",
)
LONG = ("\x1b[2J", "n" * 300, "x/" * 2000 + "x", "", ".", "a\n", "a.png/b.png")
KINDS = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def content(draw: random.Random) -> bytes:
    """A small file, or sometimes a highly compressible one that is larger than expected."""
    return bytes(3 * MOST) if draw.random() < 0.1 else draw.randbytes(draw.randrange(3000))


def name(draw: random.Random) -> str:
    return f"{draw.randrange(3)}.png" if draw.random() < 0.7 else draw.choice(NAMES + LONG)


def packed(draw: random.Random, suffix: str) -> bytes:
    """An archive of a few members, some with unusual names or types."""
    stream = io.BytesIO()
    count = draw.randint(1, 4)
    if suffix == ".zip":
        with zipfile.ZipFile(stream, "w", draw.choice(METHODS)) as archive:
            for _ in range(count):
                archive.writestr(zipfile.ZipInfo(name(draw)), content(draw), draw.choice(METHODS))
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode="w:gz" if suffix == ".tgz" else "w") as archive:
        for _ in range(count):
            info = tarfile.TarInfo(name(draw))
            info.type = draw.choice(KINDS) if draw.random() < 0.2 else tarfile.REGTYPE
            info.linkname = "../evil"
            data = content(draw) if info.isreg() else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """An archive with some bytes removed, changed or inserted, mostly in its headers."""
    changed = bytearray(whole)
    near_end = len(changed) - 1 - draw.randrange(min(200, len(changed)))
    place = draw.choice((draw.randrange(min(520, len(changed))), near_end))
    kind = draw.randrange(5)
    if kind == 0:
        del changed[place:]
    elif kind == 1:
        changed[place : place + 4] = draw.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
    elif kind == 2:
        changed[place:place] = draw.randbytes(20)
    elif kind == 3:
        changed[place] ^= 1 << draw.randrange(8)
    else:
        changed += whole
    return bytes(changed)


@pytest.mark.parametrize("number", range(ARCHIVES))
def test_an_archive_is_unpacked_completely_or_refused(
    tmp_path: Path, number: int, table: Table
) -> None:
    draw = random.Random(number)
    suffix = draw.choice((".zip", ".tgz", ".tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # duplicate names in a zip
        whole = packed(draw, suffix)
    archive = tmp_path / f"a{suffix}"
    archive.write_bytes(whole if draw.random() < 0.3 else damaged(draw, whole))
    folder = tmp_path / "in" / "out"
    message = table.attempt(
        "archives", f"number {number}, {suffix}", lambda: unpack(archive, folder, most=MOST)
    )
    # Everything or nothing, and no other files.
    assert {path.name for path in tmp_path.iterdir()} <= {archive.name, "in"}
    assert [path.name for path in folder.parent.glob("*")] == ([] if message else ["out"])
    assert not Path("/tmp/evil-of-a-test").exists()
    held = [path for path in folder.rglob("*") if not path.is_dir()]
    assert all(path.is_file() and not path.is_symlink() for path in held)
    assert sum(path.stat().st_size for path in held) <= MOST
