from __future__ import annotations

import errno
import shlex
from pathlib import Path

import pytest

from data import check, make_phantom, resize
from tests.preparation.archives import write_csv, write_images
from tests.preparation.builders.test_padchest import HEADER, many
from vilmedic import cli
from vilmedic.preparation.builders import any_folder, padchest
from vilmedic.preparation.command import Next, guarded
from vilmedic.preparation.folder import Dropped

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config" / "phantom" / "simclr.yml"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise OSError(number, "No space left on device")

    assert guarded("make_x", full) == 2
    assert capsys.readouterr().err == (
        "make_x: The disk is full. What is complete is kept: free space and run the same "
        "command again.\n"
    )


def test_folders_that_cannot_be_created_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def next_words(printed: str) -> list[str]:
    """The arguments of the command that a builder prints last."""
    return shlex.split(printed.partition("Next:\n")[2].replace("\\\n", " "))


@pytest.mark.parametrize(
    ("columns", "config"),
    [
        (
            ["--report-column", "text", "--label-columns", "mass"],
            "config/SELFSUP/convirt-mimic.yml",
        ),
        (["--label-columns", "mass"], "config/downstream/nih.yml"),
        ([], "config/SELFSUP/simclr-mimic.yml"),
    ],
)
def test_a_builder_prints_the_next_command(
    columns: list[str],
    config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"{n}.png" for n in range(20)]
    rows = [[name, f"Report {n}.", str(n % 2)] for n, name in enumerate(names)]
    write_csv(tmp_path / "table.csv", ["file", "text", "mass"], rows)
    write_images(tmp_path / "my scans", names)
    words = ["--root", str(tmp_path / "mine"), "--images", str(tmp_path / "my scans")]
    words += ["--table", str(tmp_path / "table.csv"), "--image-column", "file", *columns]
    told = []
    for _ in range(2):  # built, then already present
        assert any_folder.main(words) == 0
        told.append(next_words(capsys.readouterr().out))
    assert told[0] == told[1]
    assert told[0][:4] == ["python", "bin/train.py", config, "name=mine"]
    monkeypatch.chdir(ROOT)
    assert cli.train([*told[0][2:], "--check"]) == 0, capsys.readouterr().err


def test_the_next_command_uses_the_configuration_of_the_data_set(tmp_path: Path) -> None:
    known = Next("config/SELFSUP/convirt-padchest.yml", str(tmp_path))
    assert known.command(tmp_path, "report.tok") == (
        "python bin/train.py config/SELFSUP/convirt-padchest.yml"
    )
    moved = Next("config/SELFSUP/convirt-padchest.yml", "elsewhere", Path("scans"))
    words = shlex.split(moved.command(Path("here"), "findings.tok").replace("\\\n", " "))
    assert words[3:] == [
        "dataset.image.root=here",
        "dataset.seq.root=here",
        "dataset.seq.file=findings.tok",
        "dataset.image.image_path=scans",
    ]
    five = Next("config/protocols/chexpert-5x200.yml", "five", evaluates=True)
    assert five.command(Path("five"), "impression.tok") == (
        "python bin/ensemble.py config/protocols/chexpert-5x200.yml name=<run>"
    )


def test_make_phantom_prints_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ["--train", "1", "--validate", "1", "--test", "1", "--size", "32"]
    assert make_phantom.main(["--root", str(tmp_path / "data"), *plan]) == 0
    words = next_words(capsys.readouterr().out)
    monkeypatch.chdir(ROOT)
    assert cli.train([*words[2:], "--check"]) == 0, capsys.readouterr().err
    assert f"dataset.seq.root={tmp_path / 'data'}" in words


@pytest.mark.parametrize(
    ("reason", "one"),
    [
        ("rows without labels", "row without labels"),
        ("studies whose report is empty", "study whose report is empty"),
        ("rows whose bytes that are odd", "row whose bytes that are odd"),
        ("DICOM files without an image", "DICOM file without an image"),
        (
            "images that are not in the folder of images",
            "image that is not in the folder of images",
        ),
        (
            "images of a list that could be several files by their names",
            "image of a list that could be several files by its name",
        ),
    ],
)
def test_one_left_out_sample_is_singular_and_its_key_stays(reason: str, one: str) -> None:
    dropped = Dropped()
    dropped.add(reason, "a", where="t.csv:2")
    assert dropped.summary() == [f"1 {one}, such as a (t.csv:2)."]
    assert dropped.counts() == {reason: 1}
    dropped.add(reason, "b")
    assert dropped.summary() == [f"2 {reason}, such as a (t.csv:2)."]
