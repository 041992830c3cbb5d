"""Bootstrap resamples of a run's metrics, from its predictions for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from vilmedic.comparison.runs import is_number
from vilmedic.metrics.classification import (
    SCORES,
    RankedScores,
    resamples,
    right_choices,
    right_decisions,
)

Array = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]

SAME = 1e-6  # difference of two sums of the same terms
RECALLS = (1, 5, 10)


def resampled(
    arrays: Arrays, numbers: Mapping[str, Any], *, number: int, seed: int = 0
) -> dict[str, Array]:
    """Return the metrics of a run in bootstrap resamples of its samples.

    The same seed draws the same resamples for every run with as many samples. A metric that cannot
    be computed from the predictions, for example because they are of another evaluation, is left
    out.

    Args:
        arrays: the arrays of `predictions_<split>.npz`; see docs/evaluation.md.
        numbers: the numbers of the run, as in `zero_shot auroc`.
        number: of resamples.
        seed: of the resampling.

    Returns:
        The values of each metric that can be computed, [R].
    """
    found: dict[str, Array] = {}
    protocols = dict.fromkeys(name.rpartition("/")[0] for name in arrays if "/" in name)
    for protocol in protocols:
        parts = _parts(arrays, protocol, numbers.get(f"{protocol} accuracy"))
        exact = {} if parts is None else parts.measure(None)
        wanted = {
            key: f"{protocol} {key}"
            for key, value in exact.items()
            if _is(numbers.get(f"{protocol} {key}"), float(value[0]))
        }
        if parts is None or not wanted:
            continue
        drawn: dict[str, list[Array]] = {key: [] for key in wanted}
        for counts in resamples(len(arrays["lines"]), number=number, seed=seed):
            values = parts.measure(counts)
            for key in wanted:
                drawn[key].append(values[key])
        found |= {wanted[key]: np.concatenate(chunks) for key, chunks in drawn.items()}
    return found


def _parts(arrays: Arrays, protocol: str, accuracy: Any) -> _Scores | _Ranks | None:
    """Return what computes a protocol's metrics; None if its predictions do not suffice."""
    own = {
        name.removeprefix(f"{protocol}/"): value
        for name, value in arrays.items()
        if name.startswith(f"{protocol}/")
    }
    directions = [name.removesuffix("_above") for name in own if name.endswith("_above")]
    if directions:
        return _Ranks({one: (own[f"{one}_above"], own[f"{one}_beside"]) for one in directions})
    if "scores" not in own or "labels" not in arrays:
        return None
    places = {str(name): place for place, name in enumerate(arrays["label_names"])}
    classes = [str(name) for name in own["classes"]]
    if not all(name in places for name in classes):
        return None
    labels = arrays["labels"][:, [places[name] for name in classes]]
    scores = own["scores"].astype(np.float64)
    return _Scores(scores, labels, own.get("thresholds"), accuracy)


class _Ranks:
    """Recall and median rank, of candidates above and beside the true one of each sample."""

    def __init__(self, counts: dict[str, tuple[NDArray[Any], NDArray[Any]]]) -> None:
        self.values: dict[str, Array] = {}
        self.ranks: dict[str, Array] = {}
        for direction, (above, beside) in counts.items():
            for k in RECALLS:
                recall = np.clip((k - above) / (beside + 1.0), 0, 1)
                self.values[f"{direction}_r{k}"] = recall
            self.ranks[f"{direction}_median_rank"] = 1 + above + beside / 2

    def measure(self, counts: Array | None) -> dict[str, Array]:
        """Each number in each resample, [R]; None counts every sample once."""
        size = len(next(iter(self.ranks.values())))
        w = np.ones((1, size)) if counts is None else counts
        means = {name: w @ value / size for name, value in self.values.items()}
        return means | {name: _median(value, w) for name, value in self.ranks.items()}


class _Scores:
    """AUROC, average precision, accuracy, F1 and MCC of class scores, means over the classes.

    Args:
        scores: [N, C].
        labels: 1 present, 0 absent, -1 unknown, [N, C].
        thresholds: from which on a class is chosen, [C]; None without decisions.
        accuracy: that of the results. Samples with one label each may be those of classes that
            exclude each other or not, as this number shows.
    """

    def __init__(
        self,
        scores: Array,
        labels: NDArray[np.integer],
        thresholds: Array | None,
        accuracy: Any,
    ) -> None:
        self.size = len(scores)
        hot, known = labels == 1, labels >= 0
        self.rows = [np.flatnonzero(column) for column in known.T]
        self.ranked: dict[int, RankedScores] = {}
        for k, rows in enumerate(self.rows):
            targets, values = hot[rows, k], scores[rows, k]
            if 0 < targets.sum() < len(targets) and np.isfinite(scores[:, k]).all():
                self.ranked[k] = RankedScores(values, targets)
        self.right: tuple[Array, Array] | None = None
        for right, seen in self._rules(scores, hot, known):
            if _is(accuracy, float(_accuracy(right, seen, np.ones((1, self.size)))[0])):
                self.right = right, seen
                break
        self.decisions: tuple[Array, Array, Array, Array] | None = None
        if thresholds is not None and self.ranked:
            used = [k for k in self.ranked if np.isfinite(thresholds[k])]
            hot, known, cut = hot[:, used], known[:, used], thresholds[used]
            chosen = scores[:, used] >= cut
            flags = (chosen & hot & known, chosen & ~hot & known, hot & known, known)
            a, b, c, d = (one.astype(np.float64) for one in flags)
            self.decisions = (a, b, c, d)

    def _rules(
        self, scores: Array, hot: NDArray[np.bool_], known: NDArray[np.bool_]
    ) -> Iterator[tuple[Array, Array]]:
        """Return correctness of decisions and whether it is known, [N, C], by each rule."""
        if self.ranked and known.all() and (hot.sum(axis=1) == 1).all():
            chosen = right_choices(lambda block: scores[:, block], csr_array(hot))[:, None]
            yield chosen, np.ones_like(chosen)
        if used := list(self.ranked):
            yield right_decisions(scores, hot)[:, used], known[:, used].astype(np.float64)

    def measure(self, counts: Array | None) -> dict[str, Array]:
        """Each number in each resample, [R]; None counts every sample once.

        A resample in which a class has no positive or no negative leaves that class out.
        """
        if not self.ranked:
            return {}
        w = np.ones((1, self.size)) if counts is None else counts
        each = np.array([one.measure(w[:, self.rows[k]]) for k, one in self.ranked.items()])
        found = {name: _mean(each[:, place]) for place, name in enumerate(SCORES)}
        if self.right is not None:
            found["accuracy"] = _accuracy(*self.right, w)
        if self.decisions is not None:
            tp, fp, positives, total = (w @ one for one in self.decisions)
            fn, tn = positives - tp, total - positives - fp
            with np.errstate(invalid="ignore", divide="ignore"):
                f1 = np.where(positives > 0, 2 * tp / (2 * tp + fp + fn), np.nan)
                size = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
                mcc = np.where(size > 0, (tp * tn - fp * fn) / size, 0.0)
            mcc = np.where((positives > 0) & (positives < total), mcc, np.nan)
            found |= {"f1": _mean(f1.T), "mcc": _mean(mcc.T)}
        return found


def _accuracy(right: Array, seen: Array, counts: Array) -> Array:
    """Return the mean over classes of the accuracy on known samples, [R]."""
    with np.errstate(invalid="ignore"):  # a resample without known samples
        return _mean((counts @ (right * seen) / (counts @ seen)).T)


def _mean(values: Array) -> Array:
    """The mean over classes [C, R] of those that are defined in a resample, [R]."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: Array = np.where(defined, values, 0.0).sum(axis=0) / defined.sum(axis=0)
    return means


def _median(values: Array, counts: Array) -> Array:
    """The median of repeated values, the mean of the middle two of an even number: [R]."""
    order = np.argsort(values, kind="stable")
    ranked, upto = values[order], np.cumsum(counts[:, order], axis=1)
    total = upto[:, -1:]
    first = (upto > (total - 1) // 2).argmax(axis=1)
    second = (upto > total // 2).argmax(axis=1)
    middle: Array = (ranked[first] + ranked[second]) / 2
    return middle


def _is(stated: Any, value: float) -> bool:
    """Return whether a number of the results equals the recomputed one."""
    return is_number(stated) and abs(value - stated) <= SAME
