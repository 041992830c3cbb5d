from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.end_to_end.conftest import Run
from tests.end_to_end.test_real import COVID, needs_covid
from tests.older_files import write_vilmedic
from vilmedic.models.vae import VAE

SMALL: dict[str, Any] = {
    "image_size": 32,
    "num_layers": 2,
    "num_tokens": 32,
    "codebook_dim": 8,
    "num_resnet_blocks": 1,
    "hidden_dim": 8,
}


@pytest.fixture(scope="module")
def small(phantom: Path) -> list[str]:
    """Arguments of both commands for a small VAE on the phantom data set."""
    return [
        "config/phantom/vae.yml",
        f"dataset.root={phantom}",
        *(f"model.{name}={value}" for name, value in SMALL.items()),
        "model.temperature=1.0",
        "model.temperature_rate=0.05",
        "model.temperature_end=0.6",
        "trainor.batch_size=8",
        "trainor.lr_decay=null",
        "trainor.num_workers=0",
        "ensemblor.num_workers=0",
        "trainor.log_every=1",
        "name=vae",
    ]


@pytest.fixture(scope="module")
def trained(run: Run, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two epochs of six steps with seed 5."""
    ckpt = tmp_path_factory.mktemp("vae")
    run("bin/train.py", *small, f"ckpt_dir={ckpt}", "trainor.seed=5", "trainor.epochs=2")
    return ckpt / "vae"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_temperature_and_reconstruction_are_logged(trained: Path) -> None:
    lines = metrics(trained)
    temperatures = [line["temperature"] for line in lines if "temperature" in line]
    expected = [max(0.6, math.exp(-0.05 * step)) for step in range(12)]
    assert temperatures == pytest.approx(expected)
    evaluations = [line for line in lines if "validation_loss" in line]
    assert len(evaluations) == 2
    for line in evaluations:
        # the loss also includes the KL divergence with a small weight
        assert line["validation_reconstruction_loss"] < line["validation_loss"]
        assert line["validation_reconstruction_loss"] > 0.99 * line["validation_loss"]
        assert line["validation_reconstruction_hard_loss"] > 0
        assert 1 <= line["validation_reconstruction_codebook_perplexity"] <= 32
        assert 1 / 32 <= line["validation_reconstruction_codes_used"] <= 1
    assert evaluations[1]["train_loss"] < evaluations[0]["train_loss"]


def test_each_validation_writes_a_figure(trained: Path) -> None:
    for step in (6, 12):
        path = trained / "pictures" / f"5_{step}" / "validate_reconstruction.png"
        assert min(Image.open(path).size) > 300
    board = EventAccumulator(str(trained / "tensorboard" / "5"))
    board.Reload()
    assert [event.step for event in board.Images("validate_reconstruction")] == [6, 12]
    assert board.Scalars("temperature")[-1].value == pytest.approx(0.6)


def test_a_resumed_run_equals_the_uninterrupted_one(
    run: Run, small: list[str], trained: Path, tmp_path: Path
) -> None:
    arguments = [*small, f"ckpt_dir={tmp_path}"]
    run("bin/train.py", *arguments, "trainor.seed=5", "trainor.epochs=1")
    run("bin/train.py", *arguments, "trainor.epochs=2", "ckpt=last_5.pth")

    whole, parts = (
        torch.load(directory / "last_5.pth", weights_only=True)["model"]
        for directory in (trained, tmp_path / "vae")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert metrics(tmp_path / "vae") == metrics(trained)


def test_evaluation_gives_the_numbers_of_validation(
    run: Run, small: list[str], trained: Path
) -> None:
    run("bin/ensemble.py", *small, f"ckpt_dir={trained.parent}", "ckpt=last_5.pth")

    results = json.loads((trained / "results_validate.json").read_text())
    during = [line for line in metrics(trained) if "validation_loss" in line][-1]
    for name in ("hard_loss", "codebook_perplexity", "codes_used"):
        value = results["metrics"]["reconstruction"][name]
        assert value == pytest.approx(during[f"validation_reconstruction_{name}"], rel=1e-5)
    # different noise, same temperature
    assert results["loss"] == pytest.approx(during["validation_loss"], rel=0.05)
    assert results["baselines"]["untrained"]["loss"] != results["loss"]
    for split in ("validate", "test"):
        folder = trained / "evaluations" / results["evaluation"]
        assert min(Image.open(folder / f"{split}_reconstruction.png").size) > 300


def test_a_checkpoint_of_the_original_vilmedic_is_evaluated(
    run: Run, small: list[str], tmp_path: Path
) -> None:
    write_vilmedic(tmp_path / "0.0023_32_951498.pth", VAE(**SMALL), SMALL)

    done = run(
        "bin/ensemble.py",
        *small,
        f"ckpt_dir={tmp_path}",
        f"ckpt={tmp_path}/0.0023_32_951498.pth",
        "ensemblor.splits=[test]",
        "ensemblor.baselines=[]",
        "~ensemblor.post_processing",
    )

    assert "reconstruction hard_loss" in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "model.image_size=62",
            ["model.image_size (command line): given 62", "multiple of 4", "60 or 64"],
        ),
        ("dataset.crop=16", ["image_size=32", "16 x 16 pixels"]),
    ],
)
def test_invalid_sizes_are_refused(
    change: str, words: list[str], run: Run, small: list[str], tmp_path: Path
) -> None:
    done = run("bin/train.py", *small, f"ckpt_dir={tmp_path}", change, status=2)
    assert "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in done.stderr


@needs_covid
@pytest.mark.slow
def test_an_epoch_on_real_xrays(run: Run, small: list[str], tmp_path: Path) -> None:
    arguments = [*small, f"dataset.root={COVID}", f"ckpt_dir={tmp_path}", "trainor.batch_size=16"]
    run("bin/train.py", *arguments, "trainor.seed=1", "trainor.epochs=1")

    (line,) = [line for line in metrics(tmp_path / "vae") if "train_loss" in line]
    assert 0 < line["validation_loss"] < line["train_loss"]
    (picture,) = (tmp_path / "vae" / "pictures").glob("1_*/validate_reconstruction.png")
    assert min(Image.open(picture).size) > 300
