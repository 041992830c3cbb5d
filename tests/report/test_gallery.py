from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.report.runs import results
from vilmedic.evaluation.evaluations import EvaluationFolder, write_index
from vilmedic.report.gallery import MOST, read_gallery


def paint(path: Path, size: tuple[int, int] = (30, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def test_figures_are_grouped_by_kind_without_duplicates(tmp_path: Path) -> None:
    for name in (
        "curves.png",
        "test_full_visual.png",
        "test_attention_3.png",
        "validate_reconstructions.png",
        "generated/test/00001.png",
        "note.png",
        "wandb/run/media.png",
    ):
        paint(tmp_path / name)
    (tmp_path / "generated/test/00001.json").write_text(json.dumps({"report": "No effusion."}))

    found = {k.title: [p.name for p in k.pictures] for k in read_gallery(tmp_path)}

    assert found == {
        "Representations": ["test_full_visual.png"],
        "Generated images": ["generated/test/00001.png"],
        "Reconstructions": ["validate_reconstructions.png"],
        "Attention": ["test_attention_3.png"],
        "Other images": ["note.png"],
    }
    [generated] = [k for k in read_gallery(tmp_path) if k.title == "Generated images"]
    assert generated.pictures[0].caption == "No effusion."


def test_the_sheet_of_every_prompt_is_shown_with_its_prompt(tmp_path: Path) -> None:
    for k in range(MOST + 3):
        folder = tmp_path / f"generated/prompt_{k:02}"
        for name in ("sheet.png", "1.png", "2.png"):
            paint(folder / name)
        (folder / "settings.json").write_text(json.dumps({"report": f"Finding {k}."}))
    paint(tmp_path / "generated/alone/1.png")
    [kind] = read_gallery(tmp_path)
    sheets = [f"generated/prompt_{k:02}/sheet.png" for k in range(MOST + 3)]
    assert [p.name for p in kind.pictures] == [*sheets, "generated/alone/1.png"]
    assert [p.caption for p in kind.pictures[:2]] == ["Finding 0.", "Finding 1."]
    assert kind.wide
    assert kind.left_out == 0


def test_figures_of_the_latest_evaluations_are_shown(tmp_path: Path) -> None:
    about = {"system": "VAE", "checkpoints": [], "generated": False}
    for seed in (0, 1):
        one = EvaluationFolder(tmp_path, "best-1", ema=False, settings={"seed": seed}, about=about)
        one.write(results())
        paint(one.path / "test_full_visual.png")
        paint(one.path / "generated/test_1/1.png")
    record = json.loads((one.path / "evaluation.json").read_text())
    later = json.dumps(record | {"date": "2999-01-01T00:00:00+00:00"})
    (one.path / "evaluation.json").write_text(later)
    write_index(tmp_path)
    paint(tmp_path / "note.png")
    shown = [[p.name for p in kind.pictures] for kind in read_gallery(tmp_path)]
    inside = f"evaluations/{one.name}"
    assert shown == [
        [f"{inside}/test_full_visual.png"],
        [f"{inside}/generated/test_1/1.png"],
        ["note.png"],
    ]


def test_the_evaluation_comes_first_then_the_latest_step_of_the_training(tmp_path: Path) -> None:
    for step in (125, 1000, 2000, 250):
        paint(tmp_path / f"pictures/0_{step}/validate_reconstruction.png")
    folder = EvaluationFolder(tmp_path, "run", ema=False, settings={"seed": 0}, about={})
    paint(folder.path / "test_reconstruction.png")
    folder.write(results())
    [kind] = read_gallery(tmp_path)
    steps = [f"pictures/0_{step}/validate_reconstruction.png" for step in (2000, 1000, 250, 125)]
    evaluated = (folder.path / "test_reconstruction.png").relative_to(tmp_path).as_posix()
    assert [p.name for p in kind.pictures] == [evaluated, *steps]


def test_large_figures_are_scaled_down(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", (4000, 1000))
    [kind] = read_gallery(tmp_path)
    [picture] = kind.pictures
    assert (picture.width, picture.height) == (1500, 375)
    data = base64.b64decode(picture.data.partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (1500, 375)


def test_the_number_of_figures_is_limited_and_counted(tmp_path: Path) -> None:
    for i in range(MOST + 3):
        paint(tmp_path / f"attention_{i:02}.png")
    [kind] = read_gallery(tmp_path)
    assert len(kind.pictures) == MOST
    assert kind.left_out == 3


def test_damaged_figures_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    assert read_gallery(tmp_path) == []
    assert "a.png is left out" in caplog.text
