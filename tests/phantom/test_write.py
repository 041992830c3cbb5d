from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vilmedic.errors import DataError
from vilmedic.log import Progress
from vilmedic.phantom import FINDINGS, NO_FINDING, SPLITS, write
from vilmedic.phantom.write import Plan, build

SCRIPT = Path(__file__).parents[2] / "data" / "make_phantom.py"
PLAN = Plan(train=110, validate=12, test=8, size=32, seed=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "phantom"
    assert build(folder, PLAN, workers=1)
    return folder


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    folder = SCRIPT.parents[1]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": str(folder)}
    )


def test_the_number_of_workers_does_not_change_a_byte(root: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", PLAN, workers=2)
    assert digests(tmp_path / "again") == digests(root)


def test_another_seed_gives_other_images_and_reports(root: Path, tmp_path: Path) -> None:
    build(tmp_path / "other", Plan(train=5, validate=0, test=0, size=32, seed=5), workers=1)
    first, other = digests(root), digests(tmp_path / "other")
    assert first["images/train/00000.png"] != other["images/train/00000.png"]
    assert lines(root / "train.report.tok")[:5] != lines(tmp_path / "other" / "train.report.tok")


def test_splits_differ_and_more_samples_keep_the_first_ones(root: Path, tmp_path: Path) -> None:
    build(tmp_path / "few", Plan(train=3, validate=3, test=0, size=32, seed=4), workers=1)
    few = lines(tmp_path / "few" / "train.report.tok")
    assert few == lines(root / "train.report.tok")[:3]
    assert few != lines(root / "validate.report.tok")[:3]


def test_every_file_of_a_split_has_a_line_for_each_image(root: Path) -> None:
    for split in SPLITS:
        images = lines(root / f"{split}.image.tok")
        assert len(images) == PLAN.count(split) == len(set(images))
        for name in ("report.tok", "label.tok", "finding.jsonl"):
            content = lines(root / f"{split}.{name}")
            assert len(content) == len(images)
            assert all(content)
        for name in images:
            with Image.open(root / "images" / name) as image:
                assert (image.size, image.mode, image.format) == ((32, 32), "L", "PNG")


def test_labels_agree_with_the_findings_drawn(root: Path) -> None:
    seen = set()
    for split in SPLITS:
        rows = zip(
            lines(root / f"{split}.label.tok"), lines(root / f"{split}.finding.jsonl"), strict=True
        )
        for labels, record in rows:
            findings = json.loads(record)
            assert labels.split(",") == (list(findings) or [NO_FINDING])
            seen |= set(labels.split(","))
            for finding in findings.values():
                sides = [part["side"] for part in finding["parts"]]
                both = finding["side"] == "bilateral"
                assert sides == (["right", "left"] if both else [finding["side"]])
    assert seen == {*FINDINGS, NO_FINDING}


def test_the_data_card_has_label_counts_and_file_hashes(root: Path) -> None:
    card = json.loads((root / "card.json").read_text(encoding="utf-8"))
    labels = ",".join(lines(root / "train.label.tok")).split(",")
    counts = {name: labels.count(name) for name in (*FINDINGS, NO_FINDING)}
    assert card["counts"]["train"] == counts
    assert card["arguments"] == {"train": 110, "validate": 12, "test": 8, "size": 32, "seed": 4}
    found = digests(root)
    assert set(card["sha256"]) == {name for name in found if name.endswith((".tok", ".jsonl"))}
    assert all(found[name] == digest for name, digest in card["sha256"].items())


def test_an_existing_data_set_is_kept_unless_forced(tmp_path: Path) -> None:
    folder = tmp_path / "phantom"
    small = Plan(train=2, validate=1, test=1, size=32, seed=0)
    assert build(folder, small, workers=1)
    before = digests(folder)
    assert not build(folder, small, workers=1)
    other = Plan(train=2, validate=1, test=1, size=32, seed=1)
    with pytest.raises(DataError, match=r"seed 0 instead of 1.*--force"):
        build(folder, other, workers=1)
    assert digests(folder) == before
    assert build(folder, other, workers=1, force=True)
    assert digests(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]


def test_a_damaged_data_set_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "phantom"
    small = Plan(train=2, validate=1, test=1, size=32, seed=0)
    build(folder, small, workers=1)
    (folder / "images" / "train" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"missing or were changed.*--force"):
        build(folder, small, workers=1)
    assert build(folder, small, workers=1, force=True)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not a phantom data set"):
        build(tmp_path, Plan(train=1, validate=1, test=1, size=32), workers=1, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vilmedic.phantom.write.report_text", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "phantom", Plan(train=1, validate=0, test=0, size=32), workers=1)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_the_samples_of_all_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int | None, str, int]] = []

    class Noted(Progress):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            shown.append((self.total, self.unit, self.done))

    monkeypatch.setattr(write, "Progress", Noted)
    build(tmp_path / "phantom", Plan(train=3, validate=1, test=1, size=32), workers=1)
    assert shown == [(5, "samples", 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "8"], "give 32 to 1024 pixels"),
        (["--size", "4096"], "give 32 to 1024 pixels"),
        (["--train", "-1"], "given '-1'; allowed: integer >= 0"),
        (["--seed", "x"], "given 'x'; allowed: integer >= 0"),
    ],
)
def test_bad_arguments_are_explained(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_builds_and_draws_a_sheet(tmp_path: Path) -> None:
    counts = ["--train", "3", "--validate", "1", "--test", "1", "--size", "32"]
    root, sheet = str(tmp_path / "phantom"), tmp_path / "docs" / "sheet.png"
    first = run("--root", root, *counts, "--sheet", str(sheet))
    assert first.returncode == 0, first.stderr
    assert "built 5 samples" in first.stdout
    with Image.open(sheet) as image:
        assert min(image.size) > 500
    again = run("--root", root, *counts)
    assert "nothing to do" in again.stdout
    refused = run("--root", root, *counts, "--seed", "9")
    assert refused.returncode == 2
    assert "--force" in refused.stderr
