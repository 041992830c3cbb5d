from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from vilmedic.metrics import bootstrap
from vilmedic.metrics.bootstrap import RankedScores, interval, resamples


@pytest.mark.parametrize("decimals", [8, 1, 0])
def test_agrees_with_scikit_learn_ties_included(decimals: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        targets = generator.random(60) < 0.3
        scores = np.round(generator.normal(size=60) + targets, decimals)
        area, precision = RankedScores(scores, targets).measure()
        assert area[0] == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
        assert precision[0] == pytest.approx(average_precision_score(targets, scores), abs=1e-12)


def test_weights_are_repetitions() -> None:
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


def test_equal_scores_are_chance() -> None:
    area, precision = RankedScores(np.ones(10), np.arange(10) < 3).measure()
    assert area[0] == 0.5
    assert precision[0] == pytest.approx(0.3)


def test_one_class_alone_is_undefined() -> None:
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
    monkeypatch.setattr(bootstrap, "CHUNK_ELEMENTS", 100)
    chunks = list(resamples(20, number=12, seed=3))
    assert [len(chunk) for chunk in chunks] == [5, 5, 2]


def test_interval_covers_the_true_area_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        targets = np.arange(120) < 60
        # The area under the curve of two unit normals 1 apart is Phi(1 / sqrt(2)).
        scores = generator.normal(size=120) + targets
        ranked = RankedScores(scores, targets)
        areas = np.concatenate(
            [ranked.measure(w)[0] for w in resamples(120, number=200, seed=seed)]
        )
        bounds = interval(areas)
        assert bounds is not None
        covered += bounds[0] <= 0.7602 <= bounds[1]
    assert 87 <= covered <= 100


def test_interval_of_nothing_is_none() -> None:
    assert interval(np.array([np.nan, np.nan])) is None
