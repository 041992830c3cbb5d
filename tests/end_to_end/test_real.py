from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.end_to_end.conftest import ROOT, Run

REAL = Path(os.environ.get("VILMEDIC_REAL_DATA", ROOT.parent / "shared" / "data"))
COVID = REAL / "covid-cxr"
NIH = REAL / "nih1000"

needs_nih = pytest.mark.skipif(
    not NIH.is_dir(),
    reason=f"no real X-rays at {NIH}; VILMEDIC_REAL_DATA names another folder",
)
needs_covid = pytest.mark.skipif(
    not COVID.is_dir(),
    reason=f"no real X-rays at {COVID}; VILMEDIC_REAL_DATA names another folder",
)


@needs_covid
@pytest.mark.slow
def test_convirt_on_real_xrays_and_notes(run_here: Run, tiny: list[str], tmp_path: Path) -> None:
    arguments = [
        *tiny,
        f"dataset.image.root={COVID}",
        f"dataset.seq.root={COVID}",
        f"dataset.label.root={COVID}",
        "dataset.seq.file=report.tok",
        "dataset.image.preset=convirt",
        "dataset.image.transforms=null",
        f"ckpt_dir={tmp_path}",
        "name=real",
        "trainor.lr_decay=null",
        "trainor.early_stop_metric=validation_loss",
        "~validator.metrics.zero_shot",
    ]
    run_here("bin/train.py", *arguments, "trainor.seed=1", "trainor.epochs=1")
    run_here("bin/train.py", *arguments, "trainor.epochs=2", "ckpt=last_1.pth")
    run_here(
        "bin/ensemble.py",
        *arguments,
        "~ensemblor.metrics.zero_shot",
        "~ensemblor.post_processing",
        "ensemblor.post_processing.plot_representation={keys: [visual], method: pca}",
    )

    run_dir = tmp_path / "real"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train_loss = [line["train_loss"] for line in lines if "train_loss" in line]
    assert len(train_loss) == 2
    assert train_loss[1] < train_loss[0]
    for split, samples in (("validate", 19), ("test", 32)):
        results = json.loads((run_dir / f"results_{split}.json").read_text())
        assert results["samples"] == samples
        assert results["metrics"]["retrieval"]["image_to_text_median_rank"] <= samples
        assert (
            min(
                Image.open(
                    run_dir / "evaluations" / results["evaluation"] / f"{split}_full_visual.png"
                ).size
            )
            > 300
        )


@needs_nih
@pytest.mark.slow
def test_simclr_on_real_xrays_with_several_labels(run_here: Run, tmp_path: Path) -> None:
    arguments = [
        f"ckpt_dir={tmp_path}",
        "name=real",
        "model.cnn.backbone=shufflenet_v2_x0_5",
        "model.projection.visual_embedding_dim=1024",
        "trainor.num_workers=0",
        "ensemblor.num_workers=0",
    ]
    run_here(
        "bin/train.py",
        "config/phantom/simclr.yml",
        *arguments,
        f"dataset.root={NIH}",
        "dataset.resize=40",
        "dataset.crop=32",
        "dataset.transforms=null",
        "dataset.preset=simclr",
        "trainor.batch_size=32",
        "trainor.lr_decay=null",
        "trainor.epochs=2",
        "trainor.seed=1",
    )
    run_here(
        "bin/ensemble.py",
        "config/phantom/simclr-eval.yml",
        *arguments,
        f"dataset.image.root={NIH}",
        f"dataset.label.root={NIH}",
        "dataset.image.resize=40",
        "dataset.image.crop=32",
        "ensemblor.metrics.knn={fractions: [0.1, 1.0]}",
        "ensemblor.post_processing.plot_representation="
        "{keys: [visual_backbone], labels_keep: null, method: pca}",
    )

    run_dir = tmp_path / "real"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train_loss = [line["train_loss"] for line in lines if "train_loss" in line]
    assert train_loss[1] < train_loss[0]
    for split, samples in (("validate", 148), ("test", 192)):
        results = json.loads((run_dir / f"results_{split}.json").read_text())
        assert (results["samples"], results["loss"]) == (samples, None)
        for system in (results, *results["baselines"].values()):
            probe, knn = (system["metrics"][name] for name in ("linear_probe", "knn"))
            assert [part["fit"]["samples"] for part in probe["fractions"]] == [7, 66, 660]
            assert [part["fit"]["samples"] for part in knn["fractions"]] == [66, 660]
            for report in (probe, knn):
                assert set(report["classes"]) > {"No Finding", "Effusion"}
                low, high = report["auroc_interval"]
                assert 0.3 < low < report["auroc"] < high < 1
                unusable = [
                    name
                    for name, entry in report["classes"].items()
                    if entry["positives"] == 0 or entry["negatives"] == 0
                ]
                assert set(unusable) <= set(report["excluded"])
        assert (
            min(
                Image.open(
                    run_dir
                    / "evaluations"
                    / results["evaluation"]
                    / f"{split}_full_visual_backbone.png"
                ).size
            )
            > 300
        )


@needs_covid
@pytest.mark.slow
def test_gloria_on_real_xrays_and_notes(run_here: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yml"
    prompts.write_text(
        "COVID-19:\n"
        "  positive: [bilateral ground glass opacities, patchy peripheral infiltrates]\n"
        "  negative: [the lungs are clear, lobar consolidation]\n"
    )
    arguments = [
        "config/phantom/gloria.yml",
        f"ckpt_dir={tmp_path}",
        "name=real",
        *(f"dataset.{part}.root={COVID}" for part in ("image", "seq", "label")),
        "dataset.seq.file=report.tok",
        "dataset.image.resize=64",
        "dataset.image.crop=64",
        "model.encoder.hidden_size=32",
        "model.encoder.num_attention_heads=2",
        "model.encoder.intermediate_size=32",
        "trainor.batch_size=16",
        "trainor.num_workers=0",
        "trainor.lr_decay=null",
        "trainor.early_stop_metric=validation_loss",
        f"validator.metrics.zero_shot.prompts={prompts}",
        "ensemblor.num_workers=0",
        "ensemblor.metrics=[{retrieval: {similarity: both}}, "
        f"{{zero_shot: {{prompts: {prompts}, similarity: both}}}}, "
        "{linear_probe: {fractions: [0.1, 1.0]}}, {knn: {k: 5}}, representation]",
        "ensemblor.post_processing.plot_representation="
        "{keys: [visual], labels_keep: null, method: pca}",
        "ensemblor.post_processing.plot_attention={num_samples: 1}",
    ]
    run_here("bin/train.py", *arguments, "trainor.seed=1", "trainor.epochs=2")
    run_here("bin/ensemble.py", *arguments)

    run_dir = tmp_path / "real"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train_loss = [line["train_loss"] for line in lines if "train_loss" in line]
    assert train_loss[1] < train_loss[0]
    for split, samples in (("validate", 19), ("test", 32)):
        results = json.loads((run_dir / f"results_{split}.json").read_text())
        metrics = results["metrics"]
        assert results["samples"] == samples
        assert results["loss"] > 0
        assert metrics["retrieval"]["text_to_image_median_rank"] <= samples
        assert list(metrics["zero_shot"]["classes"]) == ["COVID-19"]
        low, high = metrics["zero_shot"]["auroc_interval"]
        assert 0 <= low <= metrics["zero_shot"]["auroc"] <= high <= 1
        for name in ("linear_probe", "knn"):
            assert metrics[name]["auroc"] is not None
            assert "No Finding" in metrics[name]["excluded"]  # neither split has it
        assert metrics["representation"]["alignment"] > 0
        for name in ("attention_0", "full_visual"):
            assert (
                min(
                    Image.open(
                        run_dir / "evaluations" / results["evaluation"] / f"{split}_{name}.png"
                    ).size
                )
                > 300
            )
