from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.end_to_end.conftest import ROOT, Run
from vilmedic.config.load import load
from vilmedic.errors import ConfigError, DataError
from vilmedic.training.trainor import Trainor


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of both commands for a small SimCLR."""
    return [
        f"ckpt_dir={tmp_path_factory.mktemp('ckpt')}",
        "name=s",
        "model.cnn.backbone=shufflenet_v2_x0_5",
        "model.projection.visual_embedding_dim=1024",
        "model.projection.projection_dim=16",
        "trainor.num_workers=0",
        "ensemblor.num_workers=0",
    ]


@pytest.fixture(scope="module")
def training(phantom: Path, arguments: list[str]) -> list[str]:
    return [
        *arguments,
        f"dataset.root={phantom}",
        "dataset.resize=40",
        "dataset.crop=32",
        "dataset.transforms=null",
        "dataset.preset=simclr_xray",
        "trainor.batch_size=8",
        "trainor.epochs=2",
        "trainor.seed=3",
        "trainor.precision=fp32",
    ]


@pytest.mark.slow
def test_trains_and_is_evaluated(
    run: Run, phantom: Path, arguments: list[str], training: list[str]
) -> None:
    run("bin/train.py", "config/phantom/simclr.yml", *training)
    evaluation = [
        *arguments,
        f"dataset.image.root={phantom}",
        f"dataset.label.root={phantom}",
        "ensemblor.post_processing.plot_representation.method=pca",
    ]
    done = run("bin/ensemble.py", "config/phantom/simclr-eval.yml", *evaluation)

    run_dir = Path(arguments[0].partition("=")[2]) / "s"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    for split, samples in (("validate", 17), ("test", 16)):
        results = json.loads((run_dir / f"results_{split}.json").read_text())
        assert results["loss"] is None
        assert (results["split"], results["samples"], results["seed"]) == (split, samples, 0)
        assert results["checkpoints"][0]["seed"] == 3
        assert results["checkpoints"][0]["metric"] == "validation_loss"
        assert results["protocols"]["linear_probe"]["fractions"] == [0.01, 0.1, 1.0]
        assert results["protocols"]["knn"]["k"] == 20
        for system in (results, *results["baselines"].values()):
            metrics = system["metrics"]
            fits = [part["fit"]["samples"] for part in metrics["linear_probe"]["fractions"]]
            assert fits == [2, 5, 48]
            for name in ("linear_probe", "knn"):
                low, high = metrics[name]["auroc_interval"]
                assert 0 <= low <= metrics[name]["auroc"] <= high <= 1
            assert metrics["representation"]["visual_backbone_effective_rank"] > 1
        assert list(results["baselines"]) == ["untrained", "raw_pixels"]
        folder = run_dir / "evaluations" / results["evaluation"]
        with Image.open(folder / f"{split}_full_visual_backbone.png") as picture:
            assert min(picture.size) > 300
    assert "linear_probe auroc, 10% of labels" in done.stdout
    for line in ("resize: 40 (the configuration says 64)", "crop: 32 (the configuration says 64)"):
        assert f"dataset.image.{line}" in done.stdout
    assert "untrained" in done.stdout


def test_two_validations_of_one_model_agree(training: list[str]) -> None:
    trainor = Trainor(load(ROOT / "config/phantom/simclr.yml", [*training, "name=twice"]))
    first = trainor.validator.score(trainor.model)
    assert first == trainor.validator.score(trainor.model)
    assert first["validation_loss"] > 0


def test_batches_that_cannot_be_contrasted_are_refused(training: list[str], phantom: Path) -> None:
    def start(*changes: str) -> None:
        Trainor(load(ROOT / "config/phantom/simclr.yml", [*training, "name=bad", *changes]))

    with pytest.raises(DataError, match=r"48 samples, fewer than trainor\.batch_size=49"):
        start("trainor.batch_size=49")
    with pytest.raises(ConfigError, match=r"trainor\.batch_size: given 1, .*at least 2"):
        start("trainor.batch_size=1")
    with pytest.raises(ConfigError, match=r"layer 'layer3' of ShuffleNetV2 does not exist"):
        start("model.cnn.output_layer=layer3")


def test_one_view_in_training_is_refused(training: list[str], tmp_path: Path) -> None:
    changes = ["dataset.views=1", f"ckpt_dir={tmp_path}", "trainor.epochs=1"]
    trainor = Trainor(load(ROOT / "config/phantom/simclr.yml", [*training, *changes]))
    with pytest.raises(ConfigError, match=r"two views.*dataset\.views=2"):
        trainor.start()
    shutil.rmtree(tmp_path)
