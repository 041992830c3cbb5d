from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluations import evaluation, random, split_features
from vilmedic.evaluation import predictions
from vilmedic.evaluation.predictions import Predictions, read_predictions
from vilmedic.metrics.classification import RankedScores
from vilmedic.metrics.retrieval import Retrieval
from vilmedic.metrics.zero_shot import ZeroShot

PROMPTS = """\
Mass: {positive: [mass], negative: [no mass]}
Effusion: {positive: [effusion], negative: [no effusion]}
"""


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    kept = Predictions()
    kept.metric = "knn"
    scores = np.array([[0.25, 0.5], [1.0, 0.0]])
    kept.take(scores=scores, labels=scores > 0.3, classes=["a", "b"])
    path = kept.write(tmp_path, "test", ["test.image.tok:1 a.png", "test.image.tok:2 b.png"])
    assert path == tmp_path / "predictions_test.npz"
    read = read_predictions(path)
    assert read["samples"].tolist() == ["test.image.tok:1 a.png", "test.image.tok:2 b.png"]
    assert read["knn/classes"].tolist() == ["a", "b"]
    assert read["knn/scores"].dtype == np.float32
    assert read["knn/labels"].dtype == bool
    assert np.array_equal(read["knn/scores"], scores)
    assert np.array_equal(read["knn/labels"], [[False, True], [True, False]])


def test_a_file_of_an_earlier_evaluation_does_not_stay(tmp_path: Path) -> None:
    kept = Predictions()
    kept.metric = "m"
    kept.take(values=np.zeros((2, 1)), numbers=["x"])
    path = kept.write(tmp_path, "test", ["1", "2"])
    assert path is not None
    assert Predictions().write(tmp_path, "test", []) is None
    assert read_predictions(path) == {}


def test_too_many_scores_are_not_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(predictions, "MOST_VALUES", 5)
    kept = Predictions()
    kept.metric = "m"
    with caplog.at_level(logging.WARNING):
        kept.take(scores=np.zeros((2, 3)))
    assert kept.arrays == {}
    assert "m: 6 scores of single samples are too many" in caplog.text


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"text"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "predictions_test.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"predictions_test\.npz|pickled"):
        read_predictions(path)


def test_arrays_of_other_lengths_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions_test.npz"
    np.savez(path, **{"samples": np.array(["1"]), "m/scores": np.zeros((2, 1))})
    with pytest.raises(ValueError, match="not of one length"):
        read_predictions(path)


def test_retrieval_keeps_the_values_that_its_numbers_are_means_of() -> None:
    visual = random(30, 4)
    one = evaluation(
        split_features({"visual": visual, "linguistic": visual + random(30, 4, seed=1)})
    )
    one.predictions.metric = "retrieval"
    report = Retrieval()(one)
    values, numbers = (one.predictions.arrays[f"retrieval/{x}"] for x in ("values", "numbers"))
    assert set(numbers.tolist()) == set(Retrieval.numbers)
    for column, number in zip(values.T, numbers, strict=True):
        middle = np.median if number.endswith("median_rank") else np.mean
        assert middle(column) == pytest.approx(report[number], abs=1e-6)


def test_zero_shot_keeps_the_scores_of_its_classes(tmp_path: Path) -> None:
    (tmp_path / "prompts.yml").write_text(PROMPTS)
    labels = (random(40, 2) > 0).int()
    split = split_features({"visual": random(40, 3)}, labels, names=["Effusion", "Mass"])
    one = evaluation(split, text=lambda texts: random(len(texts), 3, seed=5))
    one.predictions.metric = "zero_shot"
    report = ZeroShot(prompts=str(tmp_path / "prompts.yml"), bootstrap=0)(one)
    found = {name.partition("/")[2]: value for name, value in one.predictions.arrays.items()}
    assert found["classes"].tolist() == ["Mass", "Effusion"]
    assert torch.equal(torch.from_numpy(found["labels"]), labels[:, [1, 0]].bool())
    for k, name in enumerate(found["classes"]):
        area, _ = RankedScores(found["scores"][:, k], found["labels"][:, k]).measure()
        assert area[0] == pytest.approx(report["classes"][name]["auroc"], abs=1e-6)


def test_samples_have_the_same_names_wherever_the_data_lies() -> None:
    one = evaluation(split_features({"visual": random(2, 3)}))
    assert one.sample_names() == ["test.image.tok:1 0.png b.png", "test.image.tok:2 1.png b.png"]


@pytest.mark.parametrize(
    "arrays",
    [
        {"m/scores": np.zeros((2, 3)), "m/classes": np.array(["a", "b", "c"])},
        {"m/scores": np.zeros((2, 1)), "m/labels": np.zeros((2, 1), bool)},
        {"m/values": np.zeros((2, 2)), "m/numbers": np.array(["a"])},
        {"m/values": np.zeros(2), "m/numbers": np.array(["a"])},
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "predictions_test.npz"
    np.savez(path, **{"samples": np.array(["1", "2"]), **arrays})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not belong together"):
        read_predictions(path)
