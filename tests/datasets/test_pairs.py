from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from vilmedic.datasets.aligned import SampleKey
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.label import LabelDataset
from vilmedic.datasets.pairs import ImLabel, ImSeq, ImSeqLabel
from vilmedic.datasets.text import TextDataset
from vilmedic.errors import DataError
from vilmedic.preparation.shards import write_shards
from vilmedic.registry import DATASETS

Args = Callable[..., dict[str, Any]]
Write = Callable[[str, Sequence[str]], Path]


def test_images_reports_and_labels(image_args: Args, text_args: Args, label_args: Args) -> None:
    image, seq = ImageDataset(**image_args()), TextDataset(**text_args())
    label = LabelDataset(**label_args())
    dataset = ImSeqLabel(image=image, seq=seq, label=label)
    assert len(dataset) == 8
    batch = dataset.prepare(dataset.collate([dataset[SampleKey(index, 2)] for index in (5, 0)]))
    keys = {"index", "images", "input_ids", "attention_mask", "word_ids", "labels"}
    assert set(batch) == keys
    assert batch["index"].tolist() == [5, 0]
    assert batch["images"].shape == (2, 3, 12, 12)
    assert batch["labels"].tolist() == [2, 1]
    assert dataset.spec.tokenizer is seq.tokenizer
    assert dataset.spec.labels == label.names
    assert dataset.describe(5).keys() == {"image", "report", "labels"}
    assert dataset.describe(5)["report"] == "Small left pleural effusion. No pneumothorax."
    assert dataset.lines([5])[0].endswith("train.image.tok:6")
    assert dataset.encode_text(["No effusion."])["input_ids"].shape == (1, 8)


def test_flips_are_dropped_with_reports_but_not_with_labels(
    image_args: Args, text_args: Args, label_args: Args
) -> None:
    label = LabelDataset(**label_args())
    alone = ImageDataset(**image_args(preset="simclr_xray"))
    ImLabel(image=alone, label=label)
    assert alone.pixels.augmentation is not None
    assert alone.pixels.augmentation.flip
    for combine in (
        lambda image, seq: ImSeq(image=image, seq=seq),
        lambda image, seq: ImSeqLabel(image=image, seq=seq, label=label),
    ):
        image = ImageDataset(**image_args(preset="simclr_xray"))
        combine(image, TextDataset(**text_args()))
        assert image.pixels.augmentation is not None
        assert not image.pixels.augmentation.flip


def test_different_line_counts_are_an_error(
    image_args: Args, text_args: Args, write: Write
) -> None:
    write("train.report.tok", ["No effusion."] * 7)
    image, seq = ImageDataset(**image_args()), TextDataset(**text_args())
    expected = r"train\.image\.tok has 8 lines and \S+train\.report\.tok has 7"
    with pytest.raises(DataError, match=expected):
        ImSeq(image=image, seq=seq)


def test_samples_skipped_in_one_part_are_skipped_in_all(
    image_args: Args, text_args: Args, label_args: Args, write: Write
) -> None:
    write("train.image.tok", ["train_0.png"] * 3 + ["gone.png"] + ["train_0.png"] * 196)
    write("train.report.tok", ["No effusion."] + ["___"] + ["Heart is normal."] * 198)
    write("train.label.tok", ["No Finding"] * 4 + ["Pneumonia"] * 196)
    image = ImageDataset(**image_args(on_error="skip"))
    seq = TextDataset(**text_args(on_error="skip", processing="r2gen_clean_report"))
    dataset = ImSeqLabel(image=image, seq=seq, label=LabelDataset(**label_args()))
    assert len(dataset) == 198
    assert [int(line.rpartition(":")[2]) for line in dataset.lines([0, 1, 2])] == [1, 3, 5]
    assert dataset.describe(2)["labels"] == ["Pneumonia"]
    batch = dataset.collate([dataset[SampleKey(index)] for index in (1, 2)])
    names = [dataset.spec.labels[label] for label in batch["labels"]]
    assert names == ["No Finding", "Pneumonia"]
    assert set(dataset.skipped) == {1, 3}


PARTS: dict[str, tuple[str, ...]] = {
    "ImageDataset": ("image",),
    "TextDataset": ("seq",),
    "LabelDataset": ("label",),
    "ImSeq": ("image", "seq"),
    "ImSeqLabel": ("image", "seq", "label"),
    "ImLabel": ("image", "label"),
    "ImSeqShards": ("image", "seq"),
}
KEYS = {"image": {"images"}, "seq": {"ids", "word_ids", "cut"}, "label": {"labels"}}


def equal(one: Any, other: Any) -> bool:
    """Whether two samples, or parts of them, are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(np.array_equal(one, other))


@pytest.mark.parametrize("name", PARTS)
def test_a_data_set_works_as_a_torch_dataset(
    name: str, image_args: Args, text_args: Args, label_args: Args, root: Path, tmp_path: Path
) -> None:
    """Indices, negative indices and iteration work as other tools expect."""
    folder = root
    if name == "ImSeqShards":
        folder = tmp_path / "shards"
        write_shards(root, folder, samples=3)
    made = {
        "image": lambda: ImageDataset(**image_args(root=str(folder))),
        "seq": lambda: TextDataset(**text_args()),
        "label": lambda: LabelDataset(**label_args()),
    }
    parts = {part: made[part]() for part in PARTS[name]}
    dataset = next(iter(parts.values())) if len(parts) == 1 else DATASETS.get(name)(**parts)
    assert isinstance(dataset, Dataset)
    assert set(PARTS) == set(DATASETS.names())
    assert len(dataset) == 8
    expected = [dataset[SampleKey(index)] for index in range(8)]
    assert not equal(expected[0], expected[5])
    for index in range(8):
        for given in (index, index - 8, np.int64(index), torch.tensor(index)):
            assert equal(dataset[given], expected[index])
        assert dataset[index]["index"] == index
    samples = list(dataset)
    assert len(samples) == 8
    assert all(map(equal, samples, expected))
    for index in (8, -9):
        with pytest.raises(IndexError, match=f"sample {index} of 8"):
            dataset[index]
    for wrong in ("0", slice(0, 2), [0, 1], 1.0, None):
        with pytest.raises(TypeError):
            dataset[wrong]
    batches = list(DataLoader(dataset, batch_size=3, collate_fn=dataset.collate))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    part = Subset(dataset, [5, 2])
    assert equal(part[0], expected[5])
