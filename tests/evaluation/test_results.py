from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vilmedic.evaluation.results import (
    fitting,
    grouped,
    headline,
    number_name,
    protocol_names,
    source,
    table,
    write_results,
)


def results(**changes: Any) -> dict[str, Any]:
    return {
        "run": "r",
        "system": "ConVIRT",
        "ema": False,
        "split": "test",
        "samples": 5,
        "checkpoints": [{"file": "a.pth", "epoch": 3, "seed": 7}],
        "models_used": 1,
        "loss": 1.25,
        "metrics": {"probe": {"auroc": 0.8, "auroc_interval": [0.7, 0.9], "classes": {"A": 1}}},
        "baselines": {"raw": {"loss": None, "metrics": {"probe": {"auroc": None}}}},
        **changes,
    }


def test_the_file_holds_all_results_without_nan(tmp_path: Path) -> None:
    path = write_results(results(loss=float("nan"), extra=[float("inf"), 1.0]), tmp_path)
    assert path == tmp_path / "results_test.json"
    read = json.loads(path.read_text())
    assert read["loss"] is None
    assert read["extra"] == [None, 1.0]
    assert read["metrics"] == results()["metrics"]
    assert [p.name for p in tmp_path.iterdir()] == ["results_test.json"]


def test_the_table_has_one_column_per_system() -> None:
    lines = table(results()).splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("-")]
    assert rows[0][:4] == ["r,", "split", "test:", "5"]
    assert lines[0] == "r, split test: 5 samples, ConVIRT, epoch 4, seed 7"
    assert rows[1] == ["test", "ConVIRT", "raw"]
    assert rows[2] == ["loss", "1.250", "-"]
    assert rows[3] == ["probe", "auroc", "0.800", "[0.700,", "0.900]", "-"]
    assert len(rows) == 4
    assert "ensemble of 3" in table(results(models_used=3))


def test_a_table_wraps_by_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vilmedic.evaluation.results.columns", lambda: 39)
    lines = table(results()).splitlines()
    assert max(map(len, lines[1:])) <= 39
    assert [line.split()[:2] for line in lines if line.startswith("test")] == [
        ["test", "ConVIRT"],
        ["test", "raw"],
    ]
    assert fitting([["a", "bb", "cc", "dd"]], 9) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert fitting([["a", "bb", "cc", "dd"]], 11) == [slice(0, 2), slice(2, 3)]
    assert fitting([["a", "bb", "cc", "dd"]], None) == [slice(0, 3)]


def test_description_of_the_evaluated_checkpoints() -> None:
    first, second = (
        {"file": "a.pth", "epoch": 3, "seed": 7},
        {"file": "b.pth", "epoch": 0, "seed": 1},
    )
    assert source("VAE", [first]) == "VAE, epoch 4, seed 7"
    assert source("VAE", [first], ema=True) == "VAE, epoch 4, seed 7, averaged weights"
    assert source("VAE", [second, first]) == (
        "VAE, ensemble of 2 (epoch 1, seed 1; epoch 4, seed 7)"
    )
    assert source("VAE", [{"file": "vae.pt", "epoch": None, "seed": None}]) == "VAE, vae.pt"


def test_headline_numbers_exclude_intervals_and_classes() -> None:
    assert headline(results()) == {"loss": 1.25, "probe auroc": 0.8}


def test_the_table_shows_label_fractions() -> None:
    parts = [
        {"fit": {"fraction": share}, "auroc": value, "auroc_interval": None}
        for share, value in ((0.001, 0.5), (0.1, 0.6), (1.0, 0.8))
    ]
    metrics = {"probe": {"auroc": 0.8, "fractions": parts}}
    text = table(results(metrics=metrics))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "probe auroc, 0.1% of labels 0.500 -" in rows
    assert "probe auroc, 10% of labels 0.600 -" in rows
    assert "100% of labels" not in text


def test_written_paths_are_grouped_by_folder() -> None:
    paths = [Path("x/a.png"), Path("x/a.csv"), Path("x/b.png")]
    assert grouped(paths) == ["x/a.{png,csv}", "x/b.png"]


def test_protocols_and_their_numbers_have_plain_names() -> None:
    protocols: dict[str, dict[str, Any]] = {
        "zero_shot": {"similarity": "global", "prompts": "a/b.yml"},
        "zero_shot_2": {"similarity": "both", "prompts": "a/c.yml"},
        "knn": {"k": 20},
    }
    assert protocol_names(protocols) == {
        "zero_shot": "zero shot, global similarity, prompts b.yml",
        "zero_shot_2": "zero shot, both similarities, prompts c.yml",
        "knn": "kNN",
    }
    assert number_name("image_to_text_r5") == "image to text, recall at 5"
    assert number_name("same_text_text_to_image_median_rank") == (
        "same text text to image, median rank"
    )
    assert number_name("text_to_image_p10") == "text to image, precision at 10"
    assert number_name("auroc") == "AUROC"
