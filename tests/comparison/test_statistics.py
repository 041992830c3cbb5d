"""The statistics against independent references and in simulation.

`simulate` draws data with a known truth: samples are hard or easy for all systems, and seeds of a
system differ. It counts how often an interval contains the truth and how often two equal systems
are called different.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm, t

from vilmedic.comparison.statistics import (
    Estimate,
    difference,
    differences,
    estimate,
    holm,
)
from vilmedic.metrics.classification import RankedScores, resamples

Array = NDArray[np.float64]
DRAWS = 1000


def simulate(seeds: int, between_seeds: float, samples: int = 150) -> tuple[float, float]:
    """The fraction of intervals with the truth, and of equal systems called different."""
    generator = np.random.default_rng(3)
    counts = np.concatenate(list(resamples(samples, number=300, seed=0)))
    hold = different = 0
    for _ in range(DRAWS):
        shared = generator.normal(size=samples)
        systems = []
        for _ in range(2):
            own = between_seeds * generator.normal(size=(seeds, 1))
            values = shared + own + 0.7 * generator.normal(size=(seeds, samples))
            systems.append(
                estimate(values.mean(axis=1).tolist(), list(values @ counts.T / samples))
            )
        low, high = systems[0].interval or (1, 0)
        hold += low <= 0 <= high
        found = difference(systems[0], systems[1])
        different += found is not None and found.significant
    return hold / DRAWS, different / DRAWS


@pytest.mark.parametrize(
    ("seeds", "between_seeds"), [(1, 0.0), (2, 0.1), (3, 0.0), (3, 0.1), (5, 0.3)]
)
def test_interval_coverage_and_false_positive_rate(seeds: int, between_seeds: float) -> None:
    hold, different = simulate(seeds, between_seeds)
    assert 0.93 <= hold <= 0.97
    assert different <= 0.065


def test_interval_coverage_for_the_auroc_of_single_checkpoints() -> None:
    generator = np.random.default_rng(5)
    counts = np.concatenate(list(resamples(100, number=500, seed=0)))
    truth = norm.cdf(1 / np.sqrt(2))  # for scores from N(1, 1) and N(0, 1)
    hold = different = 0
    for _ in range(DRAWS):
        labels = generator.random(100) < 0.4
        shared = generator.normal(size=100)
        systems = []
        for _ in range(2):
            scores = labels + np.sqrt(0.5) * (shared + generator.normal(size=100))
            ranked = RankedScores(scores, labels)
            systems.append(estimate([ranked.measure()[0][0]], [ranked.measure(counts)[0]]))
        low, high = systems[0].interval or (1, 0)
        hold += low <= truth <= high
        found = difference(systems[0], systems[1])
        different += found is not None and found.significant
    assert 0.93 <= hold / DRAWS <= 0.97
    assert different / DRAWS <= 0.065


def delong(one: Array, two: Array, labels: NDArray[np.bool_]) -> float:
    """The p-value of two AUROCs on the same samples, with the formulas of DeLong et al. (1988)."""
    structural = []
    for scores in (one, two):
        positive, negative = scores[labels], scores[~labels]
        wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        structural.append((wins.mean(axis=1), wins.mean(axis=0)))
    of_positives = np.cov([structural[0][0], structural[1][0]])
    of_negatives = np.cov([structural[0][1], structural[1][1]])
    covariance = of_positives / labels.sum() + of_negatives / (~labels).sum()
    gap = structural[0][0].mean() - structural[1][0].mean()
    deviation = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return float(2 * norm.sf(abs(gap) / deviation))


@pytest.mark.parametrize("skill", [1.0, 1.2, 1.5])
def test_the_paired_bootstrap_agrees_with_delong(skill: float) -> None:
    generator = np.random.default_rng(1)
    labels = generator.random(400) < 0.4
    shared = generator.normal(size=400)
    one, two = (s * labels + shared + 0.6 * generator.normal(size=400) for s in (skill, 1.0))
    systems = [
        estimate(
            [ranked.measure()[0][0]],
            [np.concatenate([ranked.measure(c)[0] for c in resamples(400, number=3000, seed=0)])],
        )
        for ranked in (RankedScores(one, labels), RankedScores(two, labels))
    ]
    found = difference(systems[0], systems[1])
    assert found is not None
    expected = delong(one, two, labels)
    # compare normal deviates, because the p-value is a steep function of them
    assert norm.isf(found.p / 2) == pytest.approx(norm.isf(expected / 2), rel=0.06)


def test_seeds_without_samples_give_a_student_interval() -> None:
    values = [0.7, 0.75, 0.72, 0.71]
    found = estimate(values, [None] * 4)
    half = t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert found.interval == pytest.approx((0.72 - half, 0.72 + half))
    assert found.spread == pytest.approx(np.std(values, ddof=1))
    assert found.over == "seeds"


def test_a_single_seed_has_a_percentile_interval() -> None:
    draws = np.arange(1001.0)
    found = estimate([500.0], [draws])
    assert found.interval == pytest.approx((25, 975))
    assert (found.spread, found.over) == (None, "samples")


def test_undefined_resamples_are_dropped() -> None:
    draws = np.where(np.arange(1001) % 10 == 3, np.nan, np.arange(1001.0))
    found = estimate([500.0], [draws])
    assert found.interval == pytest.approx((25, 975), abs=1)
    gap = difference(found, estimate([400.0], [np.zeros(1001)]))
    assert gap is not None
    assert gap.interval[1] - gap.value == pytest.approx(1.96 * np.nanstd(draws), rel=0.01)
    assert estimate([1.0], [np.where(np.arange(10) < 6, np.nan, 1.0)]).draws is None


def test_without_resamples_the_interval_of_the_evaluation_is_kept() -> None:
    assert estimate([0.5], [None], (0.4, 0.6)).interval == (0.4, 0.6)
    assert estimate([0.5], [None]).interval is None


def test_seed_variance_is_not_counted_twice() -> None:
    """Seeds that differ only by the samples add nothing to the variance over the samples."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(2000, 50))
    counts = np.concatenate(list(resamples(50, number=400, seed=0)))
    found = estimate(values.mean(axis=1).tolist(), list(values @ counts.T / 50))
    assert found.seed_variance < 0.1 * values.mean(axis=1).var() / 2000


def _single(value: float, draws: Array | None) -> Estimate:
    return estimate([value], [draws])


def test_equal_systems_do_not_differ() -> None:
    draws = np.random.default_rng(0).normal(size=100)
    found = difference(_single(0.5, draws), _single(0.5, draws))
    assert found is not None
    assert (found.value, found.p, found.significant) == (0, 1, False)


def test_the_p_value_matches_the_interval_that_ends_at_zero() -> None:
    draws = np.random.default_rng(0).normal(size=500)
    spread = float(np.std(draws, ddof=1))
    found = difference(_single(1.5, draws), _single(0.0, np.zeros(500)))
    assert found is not None
    assert found.p == pytest.approx(2 * norm.sf(1.5 / spread), rel=1e-6)
    assert found.interval == pytest.approx((1.5 - 1.96 * spread, 1.5 + 1.96 * spread), abs=1e-3)


def test_single_runs_without_samples_are_not_compared() -> None:
    assert difference(_single(0.5, None), _single(0.6, None)) is None


@pytest.mark.parametrize(
    ("given", "comparisons", "expected"),
    [
        ([0.01, 0.04, 0.03], None, [0.03, 0.06, 0.06]),
        ([0.5], None, [0.5]),
        ([0.02, 0.9], None, [0.04, 0.9]),
        ([0.01, 0.01], 3, [0.03, 0.03]),
        ([], None, []),
    ],
)
def test_holm(given: list[float], comparisons: int | None, expected: list[float]) -> None:
    assert holm(given, comparisons) == pytest.approx(expected)


def test_the_best_of_many_equal_systems_is_rarely_distinguished() -> None:
    """The best is selected by the same numbers, so the correction counts all pairs."""
    generator = np.random.default_rng(2)
    counts = np.concatenate(list(resamples(100, number=300, seed=0)))
    told = 0
    for _ in range(300):
        values = generator.normal(size=(6, 100))
        systems = [estimate([own.mean()], [counts @ own / 100]) for own in values]
        best = int(np.argmax([one.value for one in systems]))
        told += any(one is not None and one.significant for one in differences(systems, best))
    assert told / 300 <= 0.065
