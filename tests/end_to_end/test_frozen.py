"""Runs with frozen encoders, whose features are computed once for all epochs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.crash.killing import assert_same_runs
from tests.end_to_end.conftest import Run
from tests.end_to_end.test_continuing import _stopped_after
from vilmedic import run
from vilmedic.datasets.image import ImageDataset
from vilmedic.phantom.write import Plan, build

SMALL = (
    "model.cnn.backbone=shufflenet_v2_x0_5",
    "dataset.image.resize=32",
    "dataset.image.crop=32",
    "dataset.image.preset=center_crop",
    "~dataset.image.transforms",
    "trainor.batch_size=32",
    "validator.batch_size=32",
    "trainor.num_workers=0",
    "trainor.device=cpu",
    "trainor.precision=fp32",
    "trainor.seed=3",
    "trainor.log_every=1",
    "trainor.loggers=[]",
)


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_pages", lambda run_dir: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frozen") / "data"
    build(root, Plan(train=64, validate=32, test=2, size=32), force=False, workers=1)
    return root


@pytest.fixture(scope="module")
def convirt(data: Path) -> list[str]:
    """A ConVIRT with trained text encoder and heads."""
    roots = [f"dataset.{part}.root={data}" for part in ("image", "seq", "label")]
    return [
        "config/phantom/convirt.yml",
        *SMALL,
        *roots,
        "model.cnn.freeze=true",
        "model.encoder.hidden_size=16",
        "model.encoder.intermediate_size=32",
        "model.encoder.num_attention_heads=2",
        "model.encoder.num_hidden_layers=1",
        "model.projection.visual_embedding_dim=1024",
        "model.projection.textual_embedding_dim=16",
        "trainor.ema=0.9",
        "trainor.epochs=3",
        "trainor.save_every=null",
    ]


@pytest.fixture(scope="module")
def probe(data: Path) -> list[str]:
    """A classifier with a trained head, on half of the labels."""
    roots = [f"dataset.{part}.root={data}" for part in ("image", "label")]
    more = ["model.freeze=all", "dataset.fraction=0.5", "trainor.steps=3", "validator.every=1"]
    return ["config/downstream/phantom.yml", *SMALL, *roots, *more]


@pytest.mark.parametrize("name", ["convirt", "probe"])
def test_cached_features_give_the_same_run_bit_by_bit(
    run_here: Run, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    words = request.getfixturevalue(name)
    done = run_here("bin/train.py", *words, f"ckpt_dir={tmp_path}", "name=kept")
    off = "trainor.frozen_cache_gib=0"
    run_here("bin/train.py", *words, f"ckpt_dir={tmp_path}", "name=plain", off)

    assert not (tmp_path / "plain/features").exists()
    files = sorted(path.name for path in (tmp_path / "kept/features").glob("*.npy"))
    files = [file for file in files if not file.startswith(".")]
    assert [file.partition("_image")[0] for file in files] == ["train", "validate"]
    told = "Features of the frozen image encoder, split train: computed once for"
    assert f"{told} {32 if name == 'probe' else 64} samples, " in done.stdout
    assert_same_runs(tmp_path / "kept", tmp_path / "plain")


def test_images_are_read_once_for_all_epochs(
    run_here: Run, convirt: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    read = ImageDataset._each

    def counted(*arguments: object) -> object:
        nonlocal count
        count += 1
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDataset, "_each", counted)
    probes = "validator.metrics={linear_probe: {}}"  # it uses the training split too
    more = ["model.encoder.freeze=true", "trainor.early_stop_metric=validation_loss"]
    run_here("bin/train.py", *convirt, f"ckpt_dir={tmp_path}", "name=run", probes, *more)
    assert count == 64 + 32
    kinds = {path.name.partition("_features")[0] for path in tmp_path.glob("run/features/[tv]*")}
    assert kinds == {"train_image", "train_report", "validate_image", "validate_report"}


def test_report_statistics_equal_those_with_tokens(
    run_here: Run, convirt: list[str], tmp_path: Path
) -> None:
    """Equal reports are positives and counted as duplicates without tokenizing again."""
    words = [*convirt, "model.encoder.freeze=true", "model.targets=same_text", "trainor.epochs=2"]
    numbers = []
    for name, gib in (("kept", 1), ("plain", 0)):
        more = [f"name={name}", f"trainor.frozen_cache_gib={gib}"]
        run_here("bin/train.py", *words, f"ckpt_dir={tmp_path}", *more)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        numbers.append([json.loads(line) for line in lines])
    kept, plain = numbers
    shares = [one["duplicate_reports"] for one in plain if "duplicate_reports" in one]
    assert shares == [one["duplicate_reports"] for one in kept if "duplicate_reports" in one]
    assert max(shares) > 0
    for one, other in zip(kept, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-3)


def test_cached_features_do_not_change_the_ema_of_a_trained_encoder(
    run_here: Run, convirt: list[str], tmp_path: Path
) -> None:
    words = [*convirt, f"ckpt_dir={tmp_path}", "name=kept", "trainor.epochs=1"]
    run_here("bin/train.py", *words, "model.cnn.freeze=false")
    shutil.copytree(tmp_path / "kept", tmp_path / "plain")
    scores = []
    for name, gib in (("kept", 1), ("plain", 0)):
        more = [f"name={name}", f"trainor.frozen_cache_gib={gib}", "trainor.optimizer=SGD"]
        run_here("bin/train.py", *words, *more, "ckpt=last", "trainor.epochs=2")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        scores.append([json.loads(one).get("ema_validation_loss") for one in lines][-1])
    assert (tmp_path / "kept/features").is_dir()
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_an_interrupted_run_resumes_exactly(
    run_here: Run, convirt: list[str], tmp_path: Path
) -> None:
    """Also if the features were lost in between."""
    auto = [*convirt, "name=run", "ckpt=auto", "model.encoder.freeze=true"]
    run_here("bin/train.py", *auto, f"ckpt_dir={tmp_path / 'whole'}")
    words = [*auto, f"ckpt_dir={tmp_path / 'stopped'}"]
    _stopped_after(1, run_here, words)
    folder = tmp_path / "stopped/run/features"
    before = {path.name: path.read_bytes() for path in folder.glob("[tv]*")}
    for path in folder.glob("train_*"):
        path.unlink()
    done = run_here("bin/train.py", *words)
    assert "Features of the frozen image encoder, split validate: read" in done.stdout
    assert {path.name: path.read_bytes() for path in folder.glob("[tv]*")} == before
    assert_same_runs(tmp_path / "stopped/run", tmp_path / "whole/run", same_saves=False)


def test_augmented_images_are_cached_only_in_validation(
    run_here: Run, convirt: list[str], tmp_path: Path
) -> None:
    words = [*convirt, "dataset.image.preset=resize_crop", "trainor.epochs=1"]
    done = run_here("bin/train.py", *words, f"ckpt_dir={tmp_path}", "name=run")
    assert "The image encoder is frozen, but what it is given differs" in done.stdout
    files = [path.name for path in (tmp_path / "run/features").glob("[tv]*")]
    assert [file.partition("_")[0] for file in files] == ["validate"]


def test_a_later_evaluation_gives_the_validation_numbers(
    run_here: Run, convirt: list[str], tmp_path: Path
) -> None:
    words = [*convirt, f"ckpt_dir={tmp_path}", "name=run", "trainor.ema=null"]
    run_here("bin/train.py", *words, "trainor.epochs=2")
    small = ["ensemblor.splits=[validate]", "ensemblor.batch_size=32", "ensemblor.report=false"]
    off = ["ensemblor.baselines=[]", "~ensemblor.post_processing", "ensemblor.metrics={}"]
    run_here("bin/ensemble.py", *words, *small, *off, "ensemblor.num_workers=0", "ckpt=last")
    lines = [json.loads(one) for one in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [one["validation_loss"] for one in lines if "validation_loss" in one][-1]
    results = json.loads((tmp_path / "run/results_validate.json").read_text())
    assert results["loss"] == pytest.approx(trained, rel=1e-6)
