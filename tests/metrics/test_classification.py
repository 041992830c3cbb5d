from __future__ import annotations

import logging

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import average_precision_score, roc_auc_score

from vilmedic.metrics import classification
from vilmedic.metrics.classification import (
    RankedScores,
    interval,
    report_classes,
    resamples,
    right_choices,
    right_decisions,
    undefined,
)

NAMES = ("A", "B", "C")


def made_up(samples: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = rng.random((samples, 3)) < (0.5, 0.3, 0.06)
    scores = (rng.normal(size=(samples, 3)) + targets).round(1)  # with ties
    return scores, targets


def report(scores: np.ndarray, targets: np.ndarray, **options: object) -> dict:
    settings = {"bootstrap": 300, "seed": 3, "context": "probe, run, split test"} | options
    columns = csr_array(targets)
    return report_classes(lambda block: scores[:, block], columns, NAMES, **settings)  # type: ignore[arg-type]


def test_numbers_and_intervals_agree_with_explicit_resampling() -> None:
    scores, targets = made_up()
    found = report(scores, targets, multi_label=True)
    drawn = np.concatenate(list(resamples(60, number=300, seed=3))).astype(int)
    for name, measure in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        every = np.full((300, 3), np.nan)
        for r, counts in enumerate(drawn):
            rows = np.repeat(np.arange(60), counts)
            for k in range(3):
                if 0 < targets[rows, k].sum() < 60:
                    every[r, k] = measure(targets[rows, k], scores[rows, k])
        for k, label in enumerate(NAMES):
            entry = found["classes"][label]
            assert entry[name] == pytest.approx(measure(targets[:, k], scores[:, k]))
            expected = np.nanpercentile(every[:, k], [2.5, 97.5])
            assert entry[f"{name}_interval"] == pytest.approx(expected)
        assert found[name] == pytest.approx(np.mean([found["classes"][n][name] for n in NAMES]))
        expected = np.percentile(np.nanmean(every, axis=1), [2.5, 97.5])
        assert found[f"{name}_interval"] == pytest.approx(expected)
    right = np.where(scores == 0.5, 0.5, (scores > 0.5) == targets)
    hits = right[np.repeat(np.arange(60), drawn[0])]
    assert found["accuracy"] == pytest.approx(right.mean())
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high
    assert low <= hits.mean() <= high
    assert found["classes"]["B"]["positives"] == targets[:, 1].sum()
    assert found["classes"]["B"]["negatives"] == 60 - targets[:, 1].sum()


def test_classes_without_both_values_are_named_and_excluded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores, targets = made_up()
    targets[:, 0] = False
    targets[:, 1] = True
    with caplog.at_level(logging.WARNING):
        found = report(scores, targets)
    assert found["excluded"] == ["A", "B"]
    assert "probe, run, split test: left out of the means" in caplog.text
    assert "A, B." in caplog.text
    assert found["classes"]["A"]["auroc"] is None
    assert found["classes"]["A"]["auroc_interval"] is None
    assert found["auroc"] == found["classes"]["C"]["auroc"]
    assert "accuracy" not in found
    scores[4, 2] = np.nan
    assert report(scores, targets)["auroc"] is None
    assert report(scores, targets)["excluded"] == list(NAMES)


def test_accuracy_of_a_class_with_one_value_is_null() -> None:
    scores, targets = made_up()
    targets[:, 0] = False
    right = right_decisions(scores, targets)
    found = report(scores, targets, multi_label=True)
    assert found["classes"]["A"]["accuracy"] is None
    assert found["classes"]["A"]["accuracy_interval"] is None
    assert found["accuracy"] == pytest.approx(right[:, 1:].mean())
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high

    targets[:] = [True, False, False]  # one label per sample, the same for all
    one = report(scores, targets, multi_label=False)
    assert one["accuracy"] is None
    assert one["accuracy_interval"] is None


def test_tied_decisions_count_fractionally() -> None:
    scores = np.array([[0.5, 0.9, 0.2], [0.5 + 1e-15, 0.1, 0.8]])
    targets = np.array([[True, True, False], [False, True, True]])
    several = right_decisions(scores, targets)
    assert several.tolist() == [[0.5, 1.0, 1.0], [0.5, 0.0, 1.0]]
    scores = np.array([[0.4, 0.4 + 1e-16, 0.2], [1 / 3] * 3, [0.1, np.nan, 0.9], [np.nan] * 3])
    targets = np.eye(3, dtype=bool)[[0, 2, 1, 0]]
    one = right_choices(lambda block: scores[:, block], csr_array(targets))
    assert one.tolist() == [0.5, pytest.approx(1 / 3), 0.0, pytest.approx(1 / 3)]


def test_single_label_data_has_one_accuracy() -> None:
    scores, targets = made_up()
    right = np.arange(60) % 3 > 0
    targets = np.eye(3, dtype=bool)[np.arange(60) % 3]
    scores = targets + 0.1 * scores.clip(-1, 1)
    scores[~right] = [0.0, 1.0, 0.0]  # a wrong class for all samples of the first one
    found = report(scores, targets, multi_label=False)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert "accuracy" not in found["classes"]["A"]
    means = [counts @ right / 60 for counts in resamples(60, number=300, seed=3)]
    expected = np.percentile(np.concatenate(means), [2.5, 97.5])
    assert found["accuracy_interval"] == pytest.approx(expected)


def test_no_resamples_give_no_intervals() -> None:
    found = report(*made_up(), bootstrap=0)
    assert found["auroc"] > 0.5
    assert found["auroc_interval"] is None
    assert found["classes"]["A"]["auroc_interval"] is None


def test_undefined_results_have_the_shape_of_a_report() -> None:
    scores, targets = made_up()
    assert undefined().keys() == report(scores, targets).keys()
    assert undefined(accuracy=True).keys() == report(scores, targets, multi_label=True).keys()
    assert all(not value for value in undefined(accuracy=True).values())


@pytest.mark.parametrize("multi_label", [True, False])
def test_classes_in_blocks_give_the_same_report(
    monkeypatch: pytest.MonkeyPatch, multi_label: bool
) -> None:
    scores, targets = made_up()
    whole = report(scores, targets, multi_label=multi_label)
    asked: list[slice] = []

    def given(block: slice) -> np.ndarray:
        asked.append(block)
        return scores[:, block]

    monkeypatch.setattr(classification, "BLOCK", 2 * len(scores))
    options = {"bootstrap": 300, "seed": 3, "context": "probe, run, split test"}
    parts = report_classes(given, csr_array(targets), NAMES, multi_label=multi_label, **options)  # type: ignore[arg-type]
    assert set(map(str, asked)) == {"slice(0, 2, None)", "slice(2, 3, None)"}
    assert parts["classes"] == whole["classes"]
    for name in ("auroc", "average_precision", "accuracy"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-12)
        assert parts[f"{name}_interval"] == pytest.approx(whole[f"{name}_interval"], abs=1e-12)


@pytest.mark.parametrize("decimals", [8, 1, 0])
def test_agrees_with_scikit_learn_ties_included(decimals: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        targets = generator.random(60) < 0.3
        scores = np.round(generator.normal(size=60) + targets, decimals)
        area, precision = RankedScores(scores, targets).measure()
        assert area[0] == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
        assert precision[0] == pytest.approx(average_precision_score(targets, scores), abs=1e-12)


def test_sample_weights_equal_repetitions() -> None:
    generator = np.random.default_rng(1)
    targets = generator.random(40) < 0.4
    scores = np.round(generator.normal(size=40) + targets, 1)
    counts = generator.integers(0, 4, (3, 40))
    areas, precisions = RankedScores(scores, targets).measure(counts.astype(np.float64))
    for row, area, precision in zip(counts, areas, precisions, strict=True):
        repeated = np.repeat(np.arange(40), row)
        expected = roc_auc_score(targets[repeated], scores[repeated])
        assert area == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score(targets[repeated], scores[repeated])
        assert precision == pytest.approx(expected, abs=1e-12)


def test_equal_scores_give_chance_level() -> None:
    area, precision = RankedScores(np.ones(10), np.arange(10) < 3).measure()
    assert area[0] == 0.5
    assert precision[0] == pytest.approx(0.3)


def test_a_single_class_is_undefined() -> None:
    for targets in (np.zeros(5, bool), np.ones(5, bool)):
        area, precision = RankedScores(np.arange(5.0), targets).measure()
        assert np.isnan(area[0])
        assert np.isnan(precision[0])


def test_resamples_are_seeded_and_have_the_right_size(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.concatenate(list(resamples(20, number=50, seed=3)))
    assert drawn.shape == (50, 20)
    assert (drawn.sum(axis=1) == 20).all()
    again = np.concatenate(list(resamples(20, number=50, seed=3)))
    assert (drawn == again).all()
    assert (np.concatenate(list(resamples(20, number=50, seed=4))) != drawn).any()
    monkeypatch.setattr(classification, "CHUNK_ELEMENTS", 100)
    chunks = list(resamples(20, number=12, seed=3))
    assert [len(chunk) for chunk in chunks] == [5, 5, 2]


def test_interval_coverage_matches_its_level() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        targets = np.arange(120) < 60
        # The AUROC of two unit normals with means 1 apart is Phi(1 / sqrt(2)).
        scores = generator.normal(size=120) + targets
        ranked = RankedScores(scores, targets)
        areas = np.concatenate(
            [ranked.measure(w)[0] for w in resamples(120, number=200, seed=seed)]
        )
        bounds = interval(areas)
        assert bounds is not None
        covered += bounds[0] <= 0.7602 <= bounds[1]
    assert 87 <= covered <= 100


def test_empty_interval_is_none() -> None:
    assert interval(np.array([np.nan, np.nan])) is None
