from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.test_results import results
from vilmedic.evaluation.evaluations import EvaluationFolder, read_index, shown_folders


def folder(run_dir: Path, what: str = "best-1", *, ema: bool = False, **settings: Any) -> Any:
    about = {"system": "ConVIRT", "checkpoints": [{"file": "a.pth", "epoch": 3, "seed": 7}]}
    about |= {"generated": False}
    return EvaluationFolder(run_dir, what, ema=ema, settings=settings, about=about)


def test_each_configuration_has_its_own_folder(tmp_path: Path) -> None:
    names = [
        folder(tmp_path, seed=0).name,
        folder(tmp_path, seed=1).name,
        folder(tmp_path, seed=0, ema=True).name,
        folder(tmp_path, "0.5_3_7", seed=0).name,
        folder(tmp_path, "../../x y", seed=0).name,
    ]
    assert len(set(names)) == 5
    assert names[0] == folder(tmp_path, seed=0).name
    for name, start in zip(
        names, ("best-1-", "best-1-", "best-1-ema-", "0.5_3_7-", ".._.._x_y-"), strict=True
    ):
        assert name.startswith(start)
        assert len(name.removeprefix(start)) == 8
    assert not list(tmp_path.iterdir()), "nothing is written before there are results"


def test_results_are_kept_and_the_latest_are_copied(tmp_path: Path) -> None:
    first, second = folder(tmp_path, k=20), folder(tmp_path, k=5, fit=[0.1])
    first.write(results(loss=1.0))
    second.write(results(loss=2.0))
    first.write(results(loss=1.5))
    assert json.loads((first.path / "results_test.json").read_text())["loss"] == 1.5
    assert json.loads((second.path / "results_test.json").read_text())["loss"] == 2.0
    copy = tmp_path / "results_test.json"
    assert copy.read_bytes() == (first.path / "results_test.json").read_bytes()


def test_results_of_earlier_versions_are_kept(tmp_path: Path) -> None:
    older = json.dumps(results(loss=9.0))
    (tmp_path / "results_test.json").write_text(older)
    for loss in (1.0, 2.0):
        one = folder(tmp_path, loss=loss)
        one.write(results(loss=loss, evaluation=one.name))
    assert (tmp_path / "evaluations/earlier/results_test.json").read_text() == older
    assert json.loads((tmp_path / "results_test.json").read_text())["loss"] == 2.0
    assert len(read_index(tmp_path)) == 2


def test_the_index_lists_every_evaluation_and_what_sets_it_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_index(tmp_path) == []
    first = folder(tmp_path, seed=0, metrics={"knn": {"k": 20}})
    first.write(results())
    assert read_index(tmp_path)[0]["differs"] == {}
    second = folder(tmp_path, ema=True, seed=0, metrics={"knn": {"k": 5}}, crop=64)
    second.write(results(split="validate", loss=2.5, baselines={}))
    entries = {entry["folder"]: entry for entry in read_index(tmp_path)}
    assert entries.keys() == {first.name, second.name}
    one, two = entries[first.name], entries[second.name]
    assert (one["what"], one["ema"], two["ema"]) == ("best-1", False, True)
    assert one["configuration"] == first.name[-8:]
    assert one["checkpoints"] == [{"file": "a.pth", "epoch": 3, "seed": 7}]
    assert one["differs"] == {"metrics.knn.k": 20, "crop": None}
    assert two["differs"] == {"metrics.knn.k": 5, "crop": 64}
    assert one["numbers"] == {
        "test": {
            "model": {"loss": 1.25, "probe auroc": 0.8},
            "raw": {"loss": None, "probe auroc": None},
        }
    }
    assert two["numbers"]["validate"]["model"]["loss"] == 2.5
    assert one["date"] <= two["date"]
    assert "settings" not in one

    (second.path / "evaluation.json").write_text("{")
    first.write(results())
    assert [entry["folder"] for entry in read_index(tmp_path)] == [first.name]
    assert "is left out of the index" in caplog.text
    (tmp_path / "evaluations/index.json").write_text("{")
    assert [entry["folder"] for entry in read_index(tmp_path)] == [first.name]


def test_pages_show_the_latest_results_and_images(tmp_path: Path) -> None:
    def dated(one: Any, day: int) -> None:
        path = one.path / "evaluation.json"
        date = f"2026-01-0{day}T00:00:00+00:00"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"date": date}))

    made = [folder(tmp_path, seed=seed) for seed in range(4)]
    made[0].write(results())
    made[1].write(results(split="validate"))
    made[2].write(results())
    made[3]._record["generated"] = True
    made[3].note()
    for day, one in enumerate(made, start=1):
        dated(one, day)
    made[3].note()
    assert shown_folders(tmp_path) == [made[2].path, made[1].path, made[3].path]
