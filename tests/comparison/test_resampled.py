"""Resampled numbers against the protocols applied to the drawn samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.metrics import f1_score, matthews_corrcoef

from tests.made_up_evaluations import evaluation, random, split_features
from vilmedic.comparison.resampled import resampled
from vilmedic.metrics.classification import report_classes, resamples
from vilmedic.metrics.retrieval import Retrieval

NAMES = ["a", "b", "c"]
SAMPLES = 40


def made(labels: NDArray[np.integer], **arrays: Any) -> dict[str, NDArray[Any]]:
    return {
        "lines": np.arange(1, len(labels) + 1),
        "label_names": np.array(NAMES),
        "labels": labels.astype(np.int8),
        **{name.replace("__", "/"): np.asarray(value) for name, value in arrays.items()},
    }


def drawn(number: int) -> list[NDArray[np.int64]]:
    """The sample indices of each resample."""
    counts = np.concatenate(list(resamples(SAMPLES, number=number, seed=0))).astype(int)
    return [np.repeat(np.arange(SAMPLES), own) for own in counts]


def report(scores: Any, labels: Any, multi_label: bool) -> dict[str, Any]:
    return report_classes(
        lambda block: scores[:, block],
        csr_array(labels == 1),
        NAMES,
        unknown=csr_array(labels < 0),
        multi_label=multi_label,
        bootstrap=0,
        seed=0,
        context="test",
    )


@pytest.mark.parametrize("kind", ["several", "single", "one of several", "unknown"])
def test_class_numbers_equal_those_of_the_drawn_samples(kind: str) -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((SAMPLES, 3)) < 0.4).astype(int)
    if kind in ("single", "one of several"):
        labels = np.eye(3, dtype=int)[generator.integers(0, 3, SAMPLES)]
    if kind == "unknown":
        labels[generator.random(labels.shape) < 0.2] = -1
    scores = generator.random((SAMPLES, 3)).round(1)
    whole = report(scores, labels, kind != "single")
    numbers = {f"knn {key}": whole[key] for key in ("auroc", "average_precision", "accuracy")}
    arrays = made(labels, knn__scores=scores, knn__classes=NAMES)
    found = resampled(arrays, numbers, number=6)
    assert set(found) == set(numbers)
    for place, rows in enumerate(drawn(6)):
        again = report(scores[rows], labels[rows], kind != "single")
        for name, values in found.items():
            assert values[place] == pytest.approx(again[name.removeprefix("knn ")])


def test_decisions_equal_those_of_the_drawn_samples() -> None:
    generator = np.random.default_rng(1)
    labels = (generator.random((SAMPLES, 3)) < 0.4).astype(int)
    scores, cut = generator.random((SAMPLES, 3)), np.array([0.3, 0.5, np.nan])

    def means(rows: NDArray[np.int64]) -> dict[str, float]:
        pairs = [(labels[rows, k], scores[rows, k] >= cut[k]) for k in (0, 1)]
        return {
            "classification f1": np.mean([f1_score(*pair) for pair in pairs]),
            "classification mcc": np.mean([matthews_corrcoef(*pair) for pair in pairs]),
        }

    arrays = made(
        labels,
        classification__scores=scores,
        classification__classes=NAMES,
        classification__thresholds=cut,
    )
    numbers = means(np.arange(SAMPLES))
    found = resampled(arrays, numbers, number=6)
    assert set(found) == set(numbers)
    for place, rows in enumerate(drawn(6)):
        for name, value in means(rows).items():
            assert found[name][place] == pytest.approx(value)


def test_ranks_equal_those_of_the_retrieval_metric() -> None:
    visual = random(SAMPLES, 4).round(decimals=1)
    linguistic = visual + random(SAMPLES, 4, seed=1).round(decimals=1)
    linguistic[3:9] = linguistic[3]
    one = evaluation(split_features({"visual": visual, "linguistic": linguistic}))
    one.recorded = {}
    numbers = {f"retrieval {key}": value for key, value in Retrieval()(one).items()}
    own = {f"retrieval/{key}": value for key, value in one.recorded.items()}
    arrays = made(np.zeros((SAMPLES, 3), int)) | own
    found = resampled(arrays, numbers, number=6)
    assert set(found) == set(numbers)
    above, beside = (own[f"retrieval/image_to_text_{x}"] for x in ("above", "beside"))
    for place, rows in enumerate(drawn(6)):
        ranks = torch.from_numpy(1 + above + beside / 2)[rows]
        median = torch.quantile(ranks, 0.5).item()
        assert found["retrieval image_to_text_median_rank"][place] == pytest.approx(median)
        recall = np.clip((5 - above) / (beside + 1), 0, 1)[rows].mean()
        assert found["retrieval image_to_text_r5"][place] == pytest.approx(recall)


def test_numbers_that_cannot_be_reproduced_are_skipped() -> None:
    labels = np.eye(3, dtype=int)[np.arange(SAMPLES) % 3]
    arrays = made(labels, knn__scores=np.random.default_rng(0).random((SAMPLES, 3)))
    arrays["knn/classes"] = np.array(NAMES)
    assert resampled(arrays, {"knn auroc": 0.999, "knn accuracy": None}, number=4) == {}
    arrays["knn/classes"] = np.array(["a", "b", "other"])
    assert resampled(arrays, {"knn auroc": 0.5}, number=4) == {}
