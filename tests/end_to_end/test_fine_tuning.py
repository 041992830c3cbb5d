"""Fine-tuning the encoder of a run on a fraction of the labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vilmedic
from tests.end_to_end.conftest import Run
from vilmedic import run
from vilmedic.evaluation.predictions import read_predictions
from vilmedic.phantom.write import Plan, build

SMALL = (
    "model.cnn.backbone=shufflenet_v2_x0_5",
    "dataset.image.resize=32",
    "dataset.image.crop=32",
    "trainor.batch_size=4",
    "trainor.num_workers=0",
    "trainor.device=cpu",
    "trainor.seed=0",
    "ensemblor.device=cpu",
    "ensemblor.num_workers=0",
    "ensemblor.report=False",
)


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_pages", lambda run_dir: None)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("fine-tuning")
    build(folder / "data", Plan(train=40, validate=12, test=10, size=32), force=False, workers=1)
    # Unknown labels, as in CheXpert.
    path = folder / "data/train.label.tok"
    path.write_text("".join(f"{line},?Doubt\n" for line in path.read_text().split("\n") if line))
    roots = [f"dataset.{part}.root={folder / 'data'}" for part in ("image", "label")]
    return ["config/downstream/phantom.yml", *SMALL, *roots, f"ckpt_dir={folder}"]


def test_train_on_a_fraction_and_evaluate(run_here: Run, words: list[str]) -> None:
    folder = Path(words[-1].partition("=")[2])
    steps = ["trainor.steps=6", "validator.every=3", "name=first"]
    run_here("bin/train.py", *words, *steps, "model.positive_weights=balanced")
    done = run_here(
        "bin/train.py",
        *words,
        *["trainor.steps=4", "validator.every=2", "name=second", "dataset.fraction=0.2"],
        *[f"model.cnn.pretrained={folder / 'first'}", "model.freeze=stage3", "model.hidden=8"],
        "model.layer_decay=0.5",
    )
    assert "8 of 40 samples are used" in done.stdout
    listed = (folder / "second/train.ids.tok").read_text().split()
    assert len(listed) == 8
    after = torch.load(folder / "second/last_0.pth", weights_only=True)["model"]
    first = vilmedic.load(folder / "first")
    assert first.image_encoder is not None
    kept = [name for name in after if name.startswith(("cnn.network.conv1", "cnn.network.stage3"))]
    best = torch.load(first.path, weights_only=True)["model"]
    assert kept
    assert all(torch.equal(best[name], after[name]) for name in kept)
    assert any(
        not torch.equal(best[n], after[n]) for n in after if n.startswith("cnn.network.conv5")
    )

    run_here("bin/ensemble.py", *words, "name=second", "ensemblor.splits=[test]")
    results = json.loads((folder / "second/results_test.json").read_text())
    found = results["metrics"]["classification"]
    assert results["system"] == "Classifier"
    assert found["auroc_interval"][0] <= found["auroc"] <= found["auroc_interval"][1]
    assert "Doubt" in found["excluded"]
    arrays = read_predictions(folder / "second/predictions_test.npz")
    names = arrays["classification/classes"].tolist()
    assert names == list(found["classes"]) == arrays["label_names"].tolist()
    column = names.index("Atelectasis")
    scores, labels = arrays["classification/scores"], arrays["labels"]
    entry = found["classes"]["Atelectasis"]
    assert entry["positives"] == int((labels[:, column] == 1).sum())
    if entry["auroc"] is not None:
        positive, negative = (scores[labels[:, column] == y, column] for y in (1, 0))
        wins = np.sign(positive[:, None] - negative) / 2 + 0.5
        assert entry["auroc"] == pytest.approx(wins.mean())


def test_a_configuration_without_labels_is_refused(run_here: Run, words: list[str]) -> None:
    more = ["dataset.proto=ImageDataset", "dataset.root=x", "--check"]
    given = [word for word in words if "label.root" not in word and "image." not in word]
    done = run_here("bin/train.py", *given, *more, status=2)
    assert "Classifier needs labels" in done.stderr
    assert "ImLabel" in done.stderr
