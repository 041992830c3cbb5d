"""Ranking metrics over weighted samples, and bootstrap intervals made of them.

A bootstrap resample is a count for each sample: how often it was drawn. Sorting once and weighting
by those counts gives the metric of every resample from cumulative sums, without sorting again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Scores closer than this are one: the same sum rounds differently by its place in a vector.
TIE = 1e-12
CHUNK_ELEMENTS = 4_000_000


class RankedScores:
    """Scores of a binary task, sorted once.

    Args:
        scores: [N], larger for the positive class.
        targets: [N], true for positives.
    """

    def __init__(self, scores: NDArray[np.floating], targets: NDArray[np.bool_]) -> None:
        self.order = np.argsort(scores, kind="stable")
        ranked = scores[self.order]
        self.positive = targets[self.order].astype(np.float64)
        # The last position of every run of equal scores: ties count as one threshold.
        self.ends = np.flatnonzero(np.append(np.diff(ranked) > TIE, True))

    def measure(self, weights: Array | None = None) -> tuple[Array, Array]:
        """Area under the ROC curve and average precision of weighted samples.

        The area is the chance that a positive scores above a negative, ties counting half. The
        average precision is the sum over thresholds of precision times gain in recall.

        Args:
            weights: [R, N], one row a resample; None weighs every sample once.

        Returns:
            Two arrays [R]; not-a-number where a resample lacks positives or negatives.
        """
        w = np.ones((1, len(self.order))) if weights is None else weights[:, self.order]
        positives = np.cumsum(w * self.positive, axis=1)[:, self.ends]
        everyone = np.cumsum(w, axis=1)[:, self.ends]
        negatives = everyone - positives
        tied_positives = np.diff(positives, axis=1, prepend=0.0)
        tied_negatives = np.diff(negatives, axis=1, prepend=0.0)
        all_positive, all_negative = positives[:, -1:], negatives[:, -1:]
        with np.errstate(invalid="ignore", divide="ignore"):
            wins = (tied_positives * (negatives - tied_negatives / 2)).sum(axis=1)
            area = wins / (all_positive * all_negative)[:, 0]
            found = all_positive - positives + tied_positives
            alarms = all_negative - negatives + tied_negatives
            # A threshold that a resample never drew adds no recall, whatever its precision.
            precision = np.divide(
                found, found + alarms, out=np.zeros_like(found), where=found + alarms > 0
            )
            average = (tied_positives * precision).sum(axis=1) / all_positive[:, 0]
        average[np.isnan(area)] = np.nan
        return area, average


def resamples(samples: int, *, number: int, seed: int) -> Iterator[Array]:
    """Draw bootstrap resamples as counts.

    Args:
        samples: N, the size of the data and of every resample.
        number: how many resamples in all.
        seed: makes them reproducible.

    Yields:
        Chunks [r, N] of counts, small enough to keep memory bounded.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_ELEMENTS // samples)
    for start in range(0, number, rows):
        r = min(rows, number - start)
        drawn = generator.integers(0, samples, (r, samples))
        drawn += np.arange(r)[:, None] * samples
        counts = np.bincount(drawn.ravel(), minlength=r * samples)
        yield counts.reshape(r, samples).astype(np.float64)


def interval(values: Array, confidence: float = 0.95) -> list[float] | None:
    """The percentile interval of a resampled statistic.

    Args:
        values: [R]; resamples in which it was undefined are left out.
        confidence: share of the resamples inside.

    Returns:
        `[low, high]`, or None when no resample defines it.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail])
    return [float(low), float(high)]
