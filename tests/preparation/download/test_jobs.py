from __future__ import annotations

import gzip
import io
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from vilmedic.errors import DataError
from vilmedic.preparation.download.jobs import unpack


def tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            content = b"content" if member.isreg() else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_plain_members_are_unpacked(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tgz", member("deep/er/x.png"), member("./y.png"))
    assert unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "deep" / "er" / "x.png").read_bytes() == b"content"
    assert (tmp_path / "out" / "y.png").is_file()
    assert not unpack(archive, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("deep/x.txt", "content")
    assert unpack(tmp_path / "a.zip", tmp_path / "zip")
    assert (tmp_path / "zip" / "deep" / "x.txt").read_text() == "content"


@pytest.mark.parametrize(
    "bad",
    [
        member("../evil"),
        member("deep/../../evil"),
        member("/tmp/evil-of-a-test"),
        member("..\\evil"),
        member("C:\\evil"),
        member("link", tarfile.SYMTYPE, "../evil"),
        member("hard", tarfile.LNKTYPE, "../evil"),
        member("device", tarfile.CHRTYPE),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_tar_members_outside_the_folder_are_refused(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    archive = tar(tmp_path / "a.tgz", member("fine.png"), bad)
    with pytest.raises(DataError, match=r"outside its folder|no plain file"):
        unpack(archive, tmp_path / "in" / "out")
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "in" / "evil").exists()
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\..\\evil"])
def test_zip_members_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "content")
    with pytest.raises(DataError, match="outside its folder"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "../evil")
    with pytest.raises(DataError, match="no plain file"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_changed_byte_anywhere_in_a_tar_is_found(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = tmp_path / "whole.tgz"
    with tarfile.open(whole, "w:gz") as archive:
        for number in range(20):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = 2000
            archive.addfile(info, io.BytesIO(draw.randbytes(info.size)))
    content = whole.read_bytes()
    for _ in range(30):
        spoilt = bytearray(content)
        spoilt[draw.randrange(50, len(content))] ^= draw.randrange(1, 256)
        (tmp_path / "a.tgz").write_bytes(spoilt)
        with pytest.raises(DataError, match=r"a\.tgz is damaged"):
            unpack(tmp_path / "a.tgz", tmp_path / "in" / "out")
        assert list((tmp_path / "in").iterdir()) == []


def test_a_changed_byte_in_a_zip_is_found(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x.txt", "content " * 1000)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for place in range(35, 50):
        spoilt = content.copy()
        spoilt[place] ^= 255
        (tmp_path / "a.zip").write_bytes(spoilt)
        with pytest.raises(DataError, match=r"a\.zip is damaged"):
            unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_truncated_archive_leaves_nothing(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tgz", *(member(f"{n}.png") for n in range(500)))
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(DataError, match="is damaged"):
        unpack(whole, tmp_path / "in" / "out")
    assert list((tmp_path / "in").iterdir()) == []


def test_archives_larger_than_expected_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(10_000_000))
    with pytest.raises(DataError, match=r"unpacks to more than 5\.0 MB"):
        unpack(tmp_path / "a.zip", tmp_path / "out", most=5_000_000)
    assert not (tmp_path / "out").exists()
    assert unpack(tmp_path / "a.zip", tmp_path / "out", most=10_000_000)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vilmedic.files.MOST_PACKED", 10)
    with gzip.open(tmp_path / "a.tgz", "wb") as stream:
        for _ in range(11):
            stream.write(bytes(2**20))
    with pytest.raises(DataError, match="10 times its size"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    """A sparse member of a few hundred bytes unpacks to a terabyte."""
    info = tarfile.TarInfo("sparse.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = header[398:410] = b"%011o\0" % 0
    header[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match="no plain file"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("kind", ["w:xz", "w:bz2"])
def test_a_tar_of_another_compression_is_refused(tmp_path: Path, kind: str) -> None:
    """It could unpack to any size: only gzip streams are measured before."""
    with tarfile.open(tmp_path / "a.tar", kind) as archive:
        info = tarfile.TarInfo("zeros.png")
        info.size = 10_000_000
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(DataError, match="is damaged"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize(
    "names", [["a.png", "a.png/b.png"], ["a/b.png", "a"], ["x/" * 2500 + "x"], [""]]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_conflicting_members_are_refused(tmp_path: Path, kind: str, names: list[str]) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name in names:
                packed.writestr(zipfile.ZipInfo(name), "content")
    else:
        with tarfile.open(path, "w") as archive:
            for name in names:
                archive.addfile(member(name))
    with pytest.raises(DataError, match=r"is damaged|is refused"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_damage_is_found_for_every_compression_method(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", method) as packed:
        packed.writestr("x", random.Random(0).randbytes(1000))
    content = (tmp_path / "whole.zip").read_bytes()
    for place in range(45, 200, 3):  # after the LZMA header, which has version numbers
        spoilt = bytearray(content)
        spoilt[place] ^= 255
        (tmp_path / "a.zip").write_bytes(spoilt)
        with pytest.raises(DataError, match=r"is damaged"):
            unpack(tmp_path / "a.zip", tmp_path / "out")


def _with_password(content: bytes) -> bytes:
    """A zip whose only member is marked as encrypted in both headers."""
    changed = bytearray(content)
    changed[6] |= 1
    changed[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def _of_method(content: bytes, method: int) -> bytes:
    changed = bytearray(content)
    changed[8:10] = method.to_bytes(2, "little")
    place = content.index(b"PK\x01\x02") + 10
    changed[place : place + 2] = method.to_bytes(2, "little")
    return bytes(changed)


@pytest.mark.parametrize("kind", ["password", "method", "lzma"])
def test_unsupported_archives_are_an_error(tmp_path: Path, kind: str) -> None:
    method = zipfile.ZIP_LZMA if kind == "lzma" else zipfile.ZIP_DEFLATED
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("a.png", b"content" * 100)
    content = stream.getvalue()
    if kind == "password":
        content = _with_password(content)
    elif kind == "method":
        content = _of_method(content, 97)
    else:
        start = 30 + len("a.png") + 9
        content = content[:start] + bytes(20) + content[start + 20 :]
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
