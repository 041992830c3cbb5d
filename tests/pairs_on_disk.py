"""A data set of images with reports on disk, and a small GLoRIA that reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.small_models import tiny_gloria
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.label import LabelDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.datasets.pairs import ImSeqLabel
from vilmedic.datasets.text import TextDataset
from vilmedic.evaluation.evaluation import Ensemble, Evaluation
from vilmedic.models.gloria import GLoRIA

REPORTS = (
    "Small left pleural effusion. Heart is normal.",
    "No acute effusion.",
    "Large right effusion.",
    "Heart normal.",
    "Small pleural effusions, left and right.",
)
FINDINGS: tuple[dict[str, Any], ...] = (
    {"Pleural Effusion": {"side": "left", "parts": [{"box": [0.5, 0.5, 1.0, 1.0]}]}},
    {},
    {"Pleural Effusion": {"side": "right", "parts": [{"box": [0.0, 0.5, 0.25, 1.0]}]}},
    {},
    {"Pleural Effusion": {"side": "bilateral", "parts": [{"box": [0.0, 0.0, 0.5, 0.5]}]}},
)
LABELS = ("Effusion", "None", "Effusion", "None", "Effusion")


def write_pairs(
    root: Path,
    split: str = "test",
    findings: Sequence[Any] = FINDINGS,
    *,
    studies: bool = False,
) -> Path:
    """Write five grey images of 40 x 32 pixels with reports, labels and findings.

    With `studies`, a line has one to three images, its own first.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"{split}{number}.png" for number in range(len(REPORTS))]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 32), dtype=np.uint8)).save(root / "images" / name)
    lines = names
    if studies:
        lines = [",".join([*names, *names][n : n + n % 3 + 1]) for n in range(len(names))]
    rows = {"image.tok": lines, "report.tok": REPORTS, "label.tok": LABELS}
    rows["finding.jsonl"] = [json.dumps(record) for record in findings]
    for file, lines in rows.items():
        (root / f"{split}.{file}").write_text("".join(f"{line}\n" for line in lines))
    return root


def read_pairs(root: Path, split: str = "test", **image: Any) -> ImSeqLabel:
    """Read the data set: images are resized to 32 x 40 pixels and cropped to the centre 32 x 32."""
    given = {"split": split, "root": str(root)}
    return ImSeqLabel(
        image=ImageDataset(training=False, seed=0, resize=32, crop=32, **given, **image),
        seq=TextDataset(
            training=split == "train",
            seed=0,
            run_dir=root / "run",
            tokenizer_max_len=32,
            vocab_min_frequency=1,
            **given,
        ),
        label=LabelDataset(run_dir=root / "run", **given),
    )


def gloria_evaluation(root: Path, models: int = 1, batch_size: int = 2, **image: Any) -> Evaluation:
    """Untrained networks on the split `test` of `write_pairs`, or on its studies."""
    write_pairs(root, "train")
    write_pairs(root, studies="multi_image" in image)
    read_pairs(root, "train")  # builds the vocabulary
    dataset = read_pairs(root, **image)
    members: list[GLoRIA] = []
    for seed in range(models):
        torch.manual_seed(seed)
        members.append(tiny_gloria(dataset.spec))
    networks = Ensemble(
        members=[lambda member=member: member for member in members],  # type: ignore[misc]
        dataset=lambda split: dataset,
        loader=lambda data: make_loader(
            data, batch_size=batch_size, training=False, seed=0, num_workers=0
        ),
        device=torch.device("cpu"),
        precision="fp32",
    )
    return Evaluation(
        name="run",
        split="test",
        features=networks.split("test"),
        dataset=dataset,
        networks=networks,
        source=f"GLoRIA, of {models}",
        out_dir=root,
    )
