from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.end_to_end.conftest import ROOT, Run

REAL = Path(os.environ.get("VILMEDIC_REAL_DATA", ROOT.parent / "shared" / "data"))
COVID = REAL / "covid-cxr"

needs_covid = pytest.mark.skipif(
    not COVID.is_dir(),
    reason=f"no real X-rays at {COVID}; VILMEDIC_REAL_DATA names another folder",
)


@needs_covid
@pytest.mark.slow
def test_convirt_on_real_xrays_and_notes(run: Run, tiny: list[str], tmp_path: Path) -> None:
    arguments = [
        *tiny,
        f"dataset.image.root={COVID}",
        f"dataset.seq.root={COVID}",
        f"dataset.label.root={COVID}",
        "dataset.image.preset=convirt",
        "dataset.image.transforms=null",
        f"ckpt_dir={tmp_path}",
        "name=real",
        "trainor.lr_decay=null",
        "trainor.early_stop_metric=validation_loss",
        "~validator.metrics.zero_shot",
    ]
    run("bin/train.py", *arguments, "trainor.seed=1", "trainor.epochs=1")
    run("bin/train.py", *arguments, "trainor.epochs=2", "ckpt=last_1.pth")
    run(
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
        assert min(Image.open(run_dir / f"{split}_full_visual.png").size) > 300
