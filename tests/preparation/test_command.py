from __future__ import annotations

import errno
from pathlib import Path

import pytest

from data import check, make_phantom, resize
from tests.preparation.archives import write_csv, write_images
from tests.preparation.builders.test_padchest import HEADER, many
from vilmedic.preparation.builders import padchest
from vilmedic.preparation.command import guarded

CONFIG = Path(__file__).parents[2] / "config" / "phantom" / "simclr.yml"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise OSError(number, "No space left on device")

    assert guarded("make_x", full) == 2
    assert capsys.readouterr().err == (
        "make_x: The disk is full. What is complete is kept: make room and run the same command "
        "again.\n"
    )


def test_folders_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_csv(tmp_path / "table.csv", HEADER, many())
    write_images(tmp_path / "images", ["1.png"])
    (tmp_path / "file").write_text("")
    data = tmp_path / "data"
    within = str(tmp_path / "file" / "x")
    assert padchest.main(["--table", str(table), "--root", within]) == 2
    assert resize.main([str(tmp_path / "images"), within]) == 2
    plan = ["--train", "1", "--validate", "1", "--test", "1", "--size", "32"]
    assert make_phantom.main(["--root", within, *plan]) == 2
    assert make_phantom.main(["--root", str(data), *plan]) == 0
    roots = [f"dataset.root={data}", f"dataset.image_path={data / 'images'}"]
    assert check.main([str(CONFIG), *roots, "--out", within]) == 2
    errors = capsys.readouterr().err.splitlines()
    scripts = ["make_padchest", "resize", "make_phantom", "check"]
    assert [line.split(":")[0] for line in errors] == scripts
    assert all(str(tmp_path / "file") in line for line in errors)
