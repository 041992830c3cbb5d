from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vilmedic.datasets.aligned import SampleKey
from vilmedic.datasets.label import LabelDataset, label_counts
from vilmedic.errors import DataError

Args = Callable[..., dict[str, Any]]
Write = Callable[[str, Sequence[str]], Path]
NAMES = ("Cardiomegaly", "No Finding", "Pleural Effusion", "Pneumonia")


def batch(dataset: LabelDataset, *indices: int) -> torch.Tensor:
    return dataset.collate([dataset[SampleKey(index)] for index in indices])["labels"]


def test_single_label_per_sample(label_args: Args, tmp_path: Path) -> None:
    dataset = LabelDataset(**label_args())
    assert dataset.spec.labels == NAMES
    assert not dataset.spec.multi_label
    labels = batch(dataset, 0, 1, 2, 3)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 2, 0, 3]
    assert dataset.describe(1) == {"labels": ["Pleural Effusion"]}
    saved = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert saved == {"labels": list(NAMES), "multi_label": False}


def test_a_sample_with_several_labels_makes_all_splits_multi_label(
    label_args: Args, write: Write
) -> None:
    write("validate.label.tok", ["Pneumonia, Cardiomegaly", "No Finding", "Pneumonia,Pneumonia"])
    assert LabelDataset(**label_args()).spec.multi_label
    dataset = LabelDataset(**label_args(split="validate"))
    labels = batch(dataset, 0, 1, 2)
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert dataset.describe(0) == {"labels": ["Cardiomegaly", "Pneumonia"]}


def test_a_label_of_another_split_gets_a_column(label_args: Args, write: Write) -> None:
    write("test.label.tok", ["Atelectasis"])
    names = LabelDataset(**label_args()).spec.labels
    assert names == ("Atelectasis", *NAMES)
    assert LabelDataset(**label_args(split="test")).spec.labels == names


def test_labels_of_the_run_are_kept(label_args: Args, write: Write, tmp_path: Path) -> None:
    LabelDataset(**label_args())
    write("test.label.tok", ["Pneumonia", "Pneumona"])
    expected = r"test\.label\.tok:2 has the label 'Pneumona', which \S+run/labels\.json does not"
    with pytest.raises(DataError, match=expected + r" .*Did you mean 'Pneumonia'\?"):
        LabelDataset(**label_args(split="test"))
    write("test.label.tok", ["Pneumonia", "Pneumonia,Cardiomegaly"])
    with pytest.raises(DataError, match=r"tok:2 has 2 labels; set multi_label=true"):
        LabelDataset(**label_args(split="test"))
    assert LabelDataset(**label_args(split="test", multi_label=True)).spec.multi_label


def test_evaluation_without_a_training_split_builds_the_label_list(
    label_args: Args, tmp_path: Path, root: Path
) -> None:
    (root / "train.label.tok").unlink()
    dataset = LabelDataset(**label_args(split="validate"))
    assert dataset.spec.labels == NAMES
    assert (tmp_path / "run" / "labels.json").is_file()


def test_multi_label_can_be_configured(label_args: Args) -> None:
    dataset = LabelDataset(**label_args(multi_label=True))
    assert batch(dataset, 0).tolist() == [[0, 1, 0, 0]]


def test_empty_label_is_an_error(label_args: Args, write: Write) -> None:
    write("train.label.tok", ["Pneumonia", "Pneumonia,,Cardiomegaly"])
    with pytest.raises(DataError, match=r"tok:2 has an empty label"):
        LabelDataset(**label_args())


def test_many_classes_stay_sparse(label_args: Args, write: Write) -> None:
    """A dense table of all lines and classes would hold 90 million numbers."""
    classes = 30_000
    rows = [f"c{line % classes},c{7 * line % classes}" for line in range(3000)]
    rows[0] = ",".join(f"c{number}" for number in range(classes))
    write("train.label.tok", rows)
    tracemalloc.start()
    dataset = LabelDataset(**label_args())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 2**20
    labels = batch(dataset, 5, 0)
    assert labels.shape == (2, len(dataset.spec.labels))
    assert labels.sum(dim=1).tolist() == [2, classes]
    chosen = [dataset.spec.labels[column] for column in labels[0].nonzero().squeeze(1)]
    assert chosen == ["c35", "c5"]
    counts = label_counts(dataset)
    assert counts is not None
    expected = [name for row in rows for name in set(row.split(","))]
    assert counts["c35"] == expected.count("c35")
    assert sum(counts.values()) == len(expected)
    dataset.kept = dataset.kept[5:6]
    assert {name for name, n in (label_counts(dataset) or {}).items() if n} == {"c5", "c35"}


def test_a_question_mark_marks_an_unknown_label(
    label_args: Args, write: Write, tmp_path: Path
) -> None:
    write("train.label.tok", ["Pneumonia, ?Edema", "?Pneumonia,?Edema", "Edema", "No Finding"])
    write("validate.label.tok", ["?Edema"])
    dataset = LabelDataset(**label_args())
    assert dataset.spec.multi_label, "labels do not exclude each other"
    assert dataset.names == ("Edema", "No Finding", "Pneumonia")
    given = dataset.collate([dataset[line] for line in range(4)])
    assert given["labels"].tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
    unknown = [[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert (~given["labels_known"]).int().tolist() == unknown
    assert dataset.describe(1) == {"labels": []}
    assert label_counts(dataset) == {"Edema": 1, "No Finding": 1, "Pneumonia": 1}
    assert dataset.spec.positives == (1, 1, 1)
    assert dataset.spec.negatives == (1, 3, 2)


def test_a_split_without_unknown_labels_has_no_mask(label_args: Args, write: Write) -> None:
    write("test.label.tok", ["?Pneumonia", "No Finding"])
    dataset = LabelDataset(**label_args())
    assert "labels_known" not in dataset.collate([dataset[0]])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("Pneumonia,?", r"train\.label\.tok:1 has a '\?' without a label"),
        ("Mass,?Mass", r"tok:1 has the label 'Mass' both as there and as unknown"),
    ],
)
def test_invalid_question_marks_are_refused(
    label_args: Args, write: Write, line: str, problem: str
) -> None:
    write("train.label.tok", [line, "Mass"])
    with pytest.raises(DataError, match=problem):
        LabelDataset(**label_args())


def test_unknown_labels_need_multi_label(label_args: Args, write: Write) -> None:
    write("train.label.tok", ["Mass,?Pneumonia", "Mass"])
    with pytest.raises(DataError, match=r"tok:1 has labels that are unknown; set multi_label=true"):
        LabelDataset(**label_args(), multi_label=False)
