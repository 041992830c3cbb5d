from __future__ import annotations

import os
from pathlib import Path

import pytest

from vilmedic.files import replace_text


def test_replaces_a_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    replace_text(path, "é\n")
    replace_text(path, "later\n")
    assert path.read_text(encoding="utf-8") == "later\n"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_the_old_file_stays_when_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.txt"
    replace_text(path, "before\n")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "after\n")
    assert path.read_text(encoding="utf-8") == "before\n"
    assert os.listdir(tmp_path) == ["notes.txt"]
