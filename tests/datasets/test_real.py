"""Real X-rays and reports, from the folder `VILMEDIC_REAL_DATA`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.label import LabelDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.datasets.pairs import ImLabel, ImSeqLabel
from vilmedic.datasets.text import TextDataset

REAL = Path(
    os.environ.get("VILMEDIC_REAL_DATA", Path(__file__).parents[3] / "shared" / "data")
).resolve()


def folder(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real data in {REAL / name} (set VILMEDIC_REAL_DATA)")
    return REAL / name


def test_images_reports_and_labels_of_all_splits(tmp_path: Path) -> None:
    root = str(folder("covid-cxr"))
    sizes = {}
    for split in ("train", "validate", "test"):
        training = split == "train"
        given = {"split": split, "root": root}
        dataset = ImSeqLabel(
            image=ImageDataset(
                training=training, seed=0, resize=72, crop=64, preset="convirt", **given
            ),
            seq=TextDataset(
                training=training,
                seed=0,
                run_dir=tmp_path,
                processing="r2gen_clean_report",
                sample_sentence=True,
                **given,
            ),
            label=LabelDataset(run_dir=tmp_path, **given),
        )
        sizes[split] = len(dataset)
        loader = make_loader(dataset, batch_size=16, training=training, seed=0, num_workers=2)
        batches = list(loader)
        assert sum(len(batch["index"]) for batch in batches) == len(dataset)
        pixels = torch.cat([batch["images"] for batch in batches]).float()
        assert pixels.shape[1:] == (1, 64, 64)
        assert (pixels.flatten(1).std(dim=1) > 5).all()  # no image is blank
        known = torch.cat([batch["input_ids"].flatten() for batch in batches])
        if training:
            assert dataset.spec.tokenizer is not None
            assert (known != dataset.spec.tokenizer.unk_token_id).all()
        assert (torch.cat([batch["labels"] for batch in batches]).sum(dim=1) >= 1).all()
    assert sizes == {"train": 162, "validate": 19, "test": 32}


def test_images_with_several_labels(tmp_path: Path) -> None:
    root = str(folder("nih1000"))
    dataset = ImLabel(
        image=ImageDataset(
            split="test", training=False, seed=0, root=root, resize=64, crop=64, color="rgb"
        ),
        label=LabelDataset(split="test", run_dir=tmp_path, root=root),
    )
    assert dataset.spec.multi_label
    assert "No Finding" in dataset.spec.labels
    [batch] = make_loader(dataset, batch_size=192, training=False, seed=0, num_workers=0)
    assert batch["images"].shape == (192, 3, 64, 64)
    assert batch["labels"].shape == (192, len(dataset.spec.labels))
    for row, index in enumerate(batch["index"].tolist()):
        assert int(batch["labels"][row].sum()) == len(dataset.describe(index)["labels"]) > 0
