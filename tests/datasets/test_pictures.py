from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from vilmedic.datasets import pictures as module
from vilmedic.datasets.pictures import file_contents


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.bin" for number in range(4)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    names: list[str] = []
    digest = module._digest

    def note(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(module, "_digest", note)
    return names


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been written long ago."""
    monkeypatch.setattr(module, "SETTLED", -(10**12))


def test_digests_are_those_of_the_content(paths: list[Path], tmp_path: Path) -> None:
    found = file_contents([*paths, paths[0], tmp_path / "gone", tmp_path], tmp_path / "kept")
    for path in paths:
        assert found[path] == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert found[tmp_path / "gone"] == "missing"
    assert found[tmp_path] == "unreadable"


def test_files_are_read_again_when_they_were_written_to(
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


def test_files_written_just_now_are_read_again(
    paths: list[Path], read: list[str], tmp_path: Path
) -> None:
    """A second write within one tick of the clock would not show."""
    for _ in range(2):
        file_contents(paths, tmp_path / "kept")
    assert len(read) == 8


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_damaged_memory_is_not_used(
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


def test_folder_that_cannot_be_written_to(
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
