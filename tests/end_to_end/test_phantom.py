from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.end_to_end.conftest import Run

CONSTANT_RATE = ["trainor.lr_decay=null", "trainor.optim_params.lr=1e-3"]


@pytest.fixture(scope="module")
def trained(run: Run, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two epochs with seed 5."""
    ckpt = tmp_path_factory.mktemp("ckpt")
    run(
        "bin/train.py",
        *tiny,
        *CONSTANT_RATE,
        f"ckpt_dir={ckpt}",
        "name=two",
        "trainor.seed=5",
        "trainor.epochs=2",
    )
    return ckpt / "two"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_writes_all_files_of_a_run(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"last_5.pth", "config_5.yml", "environment_5.json", "metrics.jsonl"} <= names
    assert {"timing.jsonl", "tokenizer", "labels.json", "tensorboard"} <= names
    assert {"curves.png", "report.html"} <= names
    best = [name for name in names if name.endswith("_5.pth") and name[0].isdigit()]
    assert best

    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "validation_loss" in line]
    assert [line["epoch"] for line in evaluations] == [0, 1]
    assert [line["step"] for line in evaluations] == [6, 12]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 12
    for line in steps:
        assert line["loss_over_ln_batch"] == pytest.approx(line["loss"] / math.log(8))
        assert 0 <= line["in_batch_r1"] <= 1
        assert {"feature_std_visual", "feature_std_linguistic", "temperature"} <= line.keys()
    timing = [json.loads(line) for line in (trained / "timing.jsonl").read_text().splitlines()]
    assert all(0 <= line["data_wait"] <= 1 and line["memory_gib"] > 0 for line in timing)
    scores = {repr(line["validation_zero_shot_auroc"]) for line in evaluations}
    assert {name.split("_")[0] for name in best} <= scores

    environment = json.loads((trained / "environment_5.json").read_text())
    assert environment["seed"] == 5
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "trainor.epochs=2" in environment["overrides"]


def test_same_seed_gives_the_same_run_with_any_workers(
    run: Run, tiny: list[str], trained: Path, tmp_path: Path
) -> None:
    run(
        "bin/train.py",
        *tiny,
        *CONSTANT_RATE,
        f"ckpt_dir={tmp_path}",
        "name=again",
        "trainor.seed=5",
        "trainor.epochs=2",
        "trainor.num_workers=2",
    )

    assert_same_weights(trained / "last_5.pth", tmp_path / "again" / "last_5.pth")
    again = (tmp_path / "again" / "metrics.jsonl").read_text()
    assert again == (trained / "metrics.jsonl").read_text()


def test_resumed_run_equals_the_uninterrupted_one(
    run: Run, tiny: list[str], trained: Path, tmp_path: Path
) -> None:
    arguments = [*tiny, *CONSTANT_RATE, f"ckpt_dir={tmp_path}", "name=two"]
    run("bin/train.py", *arguments, "trainor.seed=5", "trainor.epochs=1")
    with open(tmp_path / "two" / "metrics.jsonl", "a") as stream:
        stream.write('{"seed": 5, "step": 7, "loss": 99.0}\n')

    run("bin/train.py", *arguments, "trainor.epochs=2", "ckpt=last_5.pth")

    assert_same_weights(trained / "last_5.pth", tmp_path / "two" / "last_5.pth")
    metrics = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert metrics == (trained / "metrics.jsonl").read_text()


def test_used_seed_is_refused_and_a_new_run_adds_one(
    run: Run, tiny: list[str], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "two")
    arguments = [*tiny, f"ckpt_dir={tmp_path}", "name=two", "trainor.epochs=1"]

    refused = run("bin/train.py", *arguments, "trainor.seed=5", status=2)
    assert "already holds a run with seed 5" in refused.stderr
    assert "Traceback" not in refused.stderr

    run("bin/train.py", *arguments)
    seeds = {path.stem.split("_")[1] for path in (tmp_path / "two").glob("last_*.pth")}
    assert len(seeds) == 2
    assert "5" in seeds


@pytest.mark.slow
def test_evaluation_of_an_ensemble(run: Run, tiny: list[str], trained: Path) -> None:
    arguments = [*tiny, f"ckpt_dir={trained.parent}", "name=two"]
    plot = "ensemblor.post_processing.plot_representation.method=pca"

    done = run("bin/ensemble.py", *arguments, "ensemblor.mode=all", plot)

    used = len([path for path in trained.glob("*.pth") if path.name[0].isdigit()])
    for split, samples in (("validate", 17), ("test", 16)):
        results = json.loads((trained / f"results_{split}.json").read_text())
        folder = trained / "evaluations" / results["evaluation"]
        assert json.loads((folder / f"results_{split}.json").read_text()) == results
        assert results["samples"] == samples
        assert results["models_used"] == used
        assert 0 < results["loss"] < 10
        assert 0 <= results["metrics"]["zero_shot"]["auroc"] <= 1
        assert 0 <= results["metrics"]["linear_probe"]["auroc"] <= 1
        retrieval = results["metrics"]["retrieval"]
        assert 0 <= retrieval["image_to_text_r1"] <= retrieval["image_to_text_r10"] <= 1
        assert results["baselines"]["raw_pixels"]["metrics"]["zero_shot"]["auroc"] is None
        for key in ("linguistic", "visual"):
            picture = folder / f"{split}_full_{key}.png"
            assert min(Image.open(picture).size) > 300
            assert picture.with_suffix(".npz").exists()
            assert picture.with_suffix(".csv").exists()
            assert not (folder / f"{split}_sampled_{key}.png").exists()  # all samples are shown
    assert "linear_probe auroc" in done.stdout
    explorer = json.loads(gzip.decompress((folder / "test_explorer.json.gz").read_bytes()))
    assert [one["key"] for one in explorer["maps"]] == ["visual", "linguistic"]
    assert all(explorer["samples"]["thumbnail"])
    assert all("." in report for report in explorer["samples"]["report"])
    assert "data-explorer-1" in (trained / "report.html").read_text()


def test_evaluation_needs_no_model_overrides(
    run: Run, tiny: list[str], phantom: Path, trained: Path, tmp_path: Path
) -> None:
    """The checkpoint holds the settings of the model, the tokenizer and the images."""
    shutil.copytree(trained, tmp_path / "two", ignore=shutil.ignore_patterns("evaluations"))
    places = [word for word in tiny if ".root=" in word]
    more = [
        f"ckpt_dir={tmp_path}",
        "name=two",
        "ckpt=last_5.pth",
        "ensemblor.splits=[test]",
        "ensemblor.metrics={retrieval: null}",
        "ensemblor.post_processing={}",
        "ensemblor.baselines=[untrained]",
        "ensemblor.num_workers=0",
        "ensemblor.report=False",
    ]
    run("bin/ensemble.py", *tiny, *more)
    told = json.loads((tmp_path / "two/results_test.json").read_text())

    done = run("bin/ensemble.py", tiny[0], *places, *more)
    found = json.loads((tmp_path / "two/results_test.json").read_text())
    assert found == told
    assert "model.encoder.hidden_size: 32 (the configuration says 128)" in done.stdout
    assert "dataset.image.crop: 32 (the configuration says 64)" in done.stdout

    other = "dataset.image.crop=16"
    done = run("bin/ensemble.py", tiny[0], *places, *more, other, status=2)
    assert "dataset.image.crop (command line): given 16, but " in done.stderr
    assert "was trained with 32" in done.stderr
    run("bin/ensemble.py", tiny[0], *places, *more, other, "ensemblor.changed=allow")
    changed = json.loads((tmp_path / "two/results_test.json").read_text())
    assert changed["changed"] == {"dataset.image.crop": {"checkpoint": 32, "used": 16}}
    assert changed["loss"] != told["loss"]
    assert len(list((tmp_path / "two/evaluations").glob("last_5-*"))) == 2


def test_evaluation_without_labels_still_writes_its_numbers(
    run: Run, tiny: list[str], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "two", ignore=shutil.ignore_patterns("*.png"))
    done = run(
        "bin/ensemble.py",
        *[word for word in tiny if not word.startswith("dataset.label")],
        f"ckpt_dir={tmp_path}",
        "name=two",
        "dataset.proto=ImSeq",
        "ckpt=last_5.pth",
        "ensemblor.splits=[test]",
        "~ensemblor.metrics.linear_probe",
        "~ensemblor.metrics.zero_shot",
    )

    results = json.loads((tmp_path / "two" / "results_test.json").read_text())
    assert results["checkpoints"][0]["file"] == "last_5.pth"
    assert "dataset.proto=ImSeqLabel" in done.stdout
    assert not list((tmp_path / "two").rglob("test_*.png"))
