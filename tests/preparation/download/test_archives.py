from __future__ import annotations

import io
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from vilmedic.errors import DataError
from vilmedic.preparation.download.archives import unpack


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


def test_plain_members_arrive(tmp_path: Path) -> None:
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
def test_no_member_leaves_its_folder(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    archive = tar(tmp_path / "a.tgz", member("fine.png"), bad)
    with pytest.raises(DataError, match=r"outside its folder|no plain file"):
        unpack(archive, tmp_path / "in" / "out")
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "in" / "evil").exists()
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\..\\evil"])
def test_no_member_of_a_zip_leaves_its_folder(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "content")
    with pytest.raises(DataError, match="outside its folder"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_link_in_a_zip(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "../evil")
    with pytest.raises(DataError, match="no plain file"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_changed_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
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


def test_a_changed_byte_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x.txt", "content " * 1000)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for place in range(35, 50):
        spoilt = content.copy()
        spoilt[place] ^= 255
        (tmp_path / "a.zip").write_bytes(spoilt)
        with pytest.raises(DataError, match=r"a\.zip is damaged"):
            unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_torn_archive_leaves_nothing(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tgz", *(member(f"{n}.png") for n in range(500)))
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(DataError, match="is damaged"):
        unpack(whole, tmp_path / "in" / "out")
    assert list((tmp_path / "in").iterdir()) == []
