"""The numbers of a run in bootstrap resamples of its samples, from what it says of each sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from vilmedic.evaluation.predictions import SAMPLES, Arrays
from vilmedic.metrics.classification import (
    SCORES,
    RankedScores,
    resamples,
    right_choices,
    right_decisions,
)

Array = NDArray[np.float64]

SAME = 1e-3  # scores are kept in float32, in which some that differed are ties
MEDIAN = "median_rank"


def resampled(
    arrays: Arrays, numbers: dict[str, Any], *, number: int, seed: int = 0
) -> dict[str, Array]:
    """The numbers of a run in resamples of its samples.

    The same seed draws the same resamples for every run with as many samples. A number that does
    not follow from what is known of single samples, because its file is another evaluation's say,
    is left out.

    Args:
        arrays: what is known of single samples; see `vilmedic.evaluation.predictions`.
        numbers: the numbers of the run, as in `zero_shot auroc`.
        number: of resamples.
        seed: of the resampling.

    Returns:
        Of each number that follows from single samples its values, [R].
    """
    found: dict[str, Array] = {}
    for name in arrays:
        metric, _, kind = name.rpartition("/")
        if kind not in ("scores", "values"):
            continue
        own = {
            key.rpartition("/")[2]: one
            for key, one in arrays.items()
            if key.startswith(f"{metric}/")
        }
        parts = _Values(own) if kind == "values" else _Scores(own)
        exact = parts.measure(None)
        wanted = {
            key: f"{metric} {key}"
            for key, value in exact.items()
            if _is_number(told := numbers.get(f"{metric} {key}")) and abs(value[0] - told) <= SAME
        }
        if not wanted:
            continue
        drawn: dict[str, list[Array]] = {key: [] for key in wanted}
        for counts in resamples(len(arrays[SAMPLES]), number=number, seed=seed):
            values = parts.measure(counts)
            for key in wanted:
                drawn[key].append(values[key])
        found |= {wanted[key]: np.concatenate(chunks) for key, chunks in drawn.items()}
    return found


class _Values:
    """Numbers that are the mean, or the median, of a value a sample."""

    def __init__(self, arrays: Arrays) -> None:
        self.values = arrays["values"].astype(np.float64)
        self.numbers = [str(name) for name in arrays["numbers"]]

    def measure(self, counts: Array | None) -> dict[str, Array]:
        """Each number in each resample, [R]; None counts every sample once."""
        w = np.ones((1, len(self.values))) if counts is None else counts
        means = w @ self.values / w.sum(axis=1, keepdims=True)
        return {
            name: _median(self.values[:, k], w) if name.endswith(MEDIAN) else means[:, k]
            for k, name in enumerate(self.numbers)
        }


class _Scores:
    """AUROC, average precision and accuracy of class scores, means over the classes."""

    def __init__(self, arrays: Arrays) -> None:
        scores, self.labels = arrays["scores"].astype(np.float64), arrays["labels"].astype(bool)
        known = arrays.get("known", np.ones_like(self.labels)).astype(bool)
        self.rows = [np.flatnonzero(column) for column in known.T]
        self.classes = []
        self.ranked = []
        for k, rows in enumerate(self.rows):
            targets, values = self.labels[rows, k], scores[rows, k]
            if 0 < targets.sum() < len(targets) and np.isfinite(values).all():
                self.classes.append(k)
                self.ranked.append(RankedScores(values, targets))
        self.right: Array | None = None
        if known.all() and self.classes:
            single = (self.labels.sum(axis=1) == 1).all()
            if single:
                self.right = right_choices(lambda block: scores[:, block], csr_array(self.labels))
            else:
                self.right = right_decisions(scores, self.labels)[:, self.classes].mean(axis=1)

    def measure(self, counts: Array | None) -> dict[str, Array]:
        """Each number in each resample, [R]; None counts every sample once.

        A resample in which a class has no positive or no negative leaves that class out.
        """
        if not self.classes:
            return {}
        w = np.ones((1, len(self.labels))) if counts is None else counts
        each = np.array(
            [
                ranked.measure(w[:, self.rows[k]])
                for k, ranked in zip(self.classes, self.ranked, strict=True)
            ]
        )  # [L, 2, R]
        defined = np.isfinite(each)
        with np.errstate(invalid="ignore"):
            means = np.where(defined, each, 0.0).sum(axis=0) / defined.sum(axis=0)
        found = dict(zip(SCORES, means, strict=True))
        if self.right is not None:
            found["accuracy"] = w @ self.right / w.sum(axis=1)
        return found


def _median(values: Array, counts: Array) -> Array:
    """The median of repeated values, the mean of the middle two of an even number: [R]."""
    order = np.argsort(values, kind="stable")
    ranked, upto = values[order], np.cumsum(counts[:, order], axis=1)
    total = upto[:, -1:]
    low, high = (total - 1) // 2, total // 2
    first = (upto > low).argmax(axis=1)
    second = (upto > high).argmax(axis=1)
    middle: Array = (ranked[first] + ranked[second]) / 2
    return middle


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
