from __future__ import annotations

from pathlib import Path

import pytest

from tests.full_disk import odd_file
from vilmedic.config.transformers_fields import model_type_of
from vilmedic.config.types import ConfigOf

MARK = ConfigOf(default="bert", key="proto")


def test_a_model_folder_gives_its_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    assert model_type_of(MARK, {"proto": str(tmp_path)}) == "roberta"
    assert model_type_of(MARK, {"proto": None}) == "bert"
    assert model_type_of(MARK, {"proto": "owner/name"}) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model_type": [1]}', "[" * 100_000, "9" * 5000, " " * 2_000_000]
)
def test_a_damaged_file_gives_no_fields(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert model_type_of(MARK, {"proto": str(tmp_path)}) is None


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_special_files_are_not_opened(tmp_path: Path, kind: str) -> None:
    odd_file(tmp_path / "config.json", kind)
    assert model_type_of(MARK, {"proto": str(tmp_path)}) is None
