from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from vilmedic.datasets import image_source as module
from vilmedic.datasets.image_source import (
    crop_square,
    file_contents,
    resize_short_side,
    resize_to,
)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.bin" for number in range(4)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    names: list[str] = []
    digest = module._digest

    def note(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(module, "_digest", note)
    return names


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat all files as written long ago."""
    monkeypatch.setattr(module, "SETTLED", -(10**12))


def test_digests_depend_on_the_content(paths: list[Path], tmp_path: Path) -> None:
    found = file_contents([*paths, paths[0], tmp_path / "gone", tmp_path], tmp_path / "kept")
    for path in paths:
        assert found[path] == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert found[tmp_path / "gone"] == "missing"
    assert found[tmp_path] == "unreadable"


def test_modified_files_are_read_again(
    paths: list[Path], read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    first = file_contents(paths, tmp_path / "kept")
    assert len(read) == 4
    read.clear()
    assert file_contents(paths, tmp_path / "kept") == first
    assert read == []

    at = paths[1].stat()
    paths[1].write_bytes(b"x" * at.st_size)
    os.utime(paths[1], ns=(at.st_atime_ns, at.st_mtime_ns))
    assert paths[1].stat().st_mtime_ns == at.st_mtime_ns
    os.utime(paths[2], (1, 1))
    second = file_contents(paths, tmp_path / "kept")
    assert sorted(read) == ["1.bin", "2.bin"]
    assert [first[path] == second[path] for path in paths] == [True, False, True, True]
    read.clear()
    assert file_contents(paths, tmp_path / "kept") == second
    assert read == []


def test_recently_written_files_are_read_again(
    paths: list[Path], read: list[str], tmp_path: Path
) -> None:
    """A second write within one clock tick would not change the time stamp."""
    for _ in range(2):
        file_contents(paths, tmp_path / "kept")
    assert len(read) == 8


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_digest_file_is_not_used(
    paths: list[Path],
    read: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: bytes | None,
) -> None:
    settle(monkeypatch)
    first = file_contents(paths, tmp_path / "kept")
    [memory] = (tmp_path / "kept").iterdir()
    memory.write_bytes(memory.read_bytes()[:-1] if damage is None else damage)
    assert file_contents(paths, tmp_path / "kept") == first
    assert len(read) == 8


def test_an_unwritable_folder_is_not_an_error(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    first = file_contents(paths, tmp_path / "kept")
    assert file_contents(paths, paths[0]) == first

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    assert file_contents(paths, tmp_path / "other") == first
    assert list((tmp_path / "other").iterdir()) == []


def test_resize_sets_the_short_side() -> None:
    image = torch.randint(0, 256, (1, 40, 20), dtype=torch.uint8)
    assert resize_short_side(image, 10).shape == (1, 20, 10)
    assert resize_short_side(image, 20) is image


@pytest.mark.parametrize("shape", [(64, 64), (37, 90), (90, 37), (33, 34), (40, 41), (8, 300)])
@pytest.mark.parametrize("size", [16, 27, 32, 61])
def test_grey_resize_equals_torchvision_bit_by_bit(shape: tuple[int, int], size: int) -> None:
    random = torch.Generator().manual_seed(size)
    image = torch.randint(0, 256, (1, *shape), generator=random, dtype=torch.uint8)
    expected = v2.functional.resize(image, [size], antialias=True)
    result = resize_short_side(image, size)
    assert torch.equal(result, expected)
    assert result.is_contiguous()


@pytest.mark.parametrize("channels", [1, 3])
def test_resized_crop_equals_torchvision_bit_by_bit(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 60, 70), dtype=torch.uint8)
    expected = v2.functional.resized_crop(image, 3, 7, 41, 53, [32, 48], antialias=True)
    assert torch.equal(resize_to(image[:, 3:44, 7:60], 32, 48), expected)
    assert resize_to(image, 60, 70) is image


def test_crop() -> None:
    image = torch.arange(35, dtype=torch.uint8).reshape(1, 5, 7)
    assert torch.equal(crop_square(image, 3, random=False), image[:, 1:4, 2:5])
    torch.manual_seed(0)
    corners = {int(crop_square(image, 3, random=True)[0, 0, 0]) for _ in range(300)}
    assert corners == {row * 7 + column for row in range(3) for column in range(5)}
    with pytest.raises(ValueError, match="5 x 7 pixels is too small for crop=6"):
        crop_square(image, 6, random=False)
