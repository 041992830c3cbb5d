"""Classification metrics shared by the protocols, with bootstrap intervals.

A bootstrap resample is a count for each sample: how often it was drawn. Sorting once and weighting
by those counts gives the metric of every resample from cumulative sums, without sorting again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from vilmedic.datasets.lines import shown
from vilmedic.log import progress

logger = logging.getLogger(__name__)

SCORES = ("auroc", "average_precision")
BLOCK = 1 << 23
"""Scores held at a time, samples times classes: of 100,000 classes all would be many gigabytes."""
LISTED = 50  # classes that a warning names

Scores = Callable[[slice], NDArray[np.float64]]
"""The scores of a slice of the classes, [N, C]."""
Array = NDArray[np.float64]
# Scores closer than this are equal: the same sum rounds differently by its place in a vector.
TIE = 1e-12
CHUNK_ELEMENTS = 4_000_000


def undefined(*, accuracy: bool = False) -> dict[str, Any]:
    """Report of a protocol that is not possible with the features or data."""
    names = (*SCORES, "accuracy") if accuracy else SCORES
    report: dict[str, Any] = {}
    for name in names:
        report |= {name: None, f"{name}_interval": None}
    return report | {"classes": {}, "excluded": []}


def class_blocks(samples: int, classes: int) -> list[slice]:
    """The classes in slices of which no more than `BLOCK` scores are held at a time."""
    width = max(1, BLOCK // max(1, samples))
    return [slice(start, min(start + width, classes)) for start in range(0, classes, width)]


def right_decisions(
    scores: NDArray[np.floating], targets: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Correctness of decisions by scores, for classes that do not exclude each other.

    Each class is decided at one half. A score of exactly one half decides nothing and counts one
    half; scores closer than `TIE` to it are equal to it.

    Args:
        scores: shares or probabilities, [N, C].
        targets: [N, C].

    Returns:
        0 to 1, [N, C].
    """
    known = np.nan_to_num(scores.astype(np.float64), nan=-1.0)
    tied = np.abs(known - 0.5) <= TIE
    return np.where(tied, 0.5, (known > 0.5) == targets)


def right_choices(scores: Scores, targets: csr_array) -> NDArray[np.float64]:
    """Correctness of choosing the class with the largest score, with one label per sample.

    Classes that share the largest score of a sample share its decision. Scores closer than `TIE`
    are equal; a class without scores is never chosen.

    Args:
        scores: of slices of the classes.
        targets: [N, L].

    Returns:
        0 to 1, [N].
    """
    samples, classes = targets.shape
    by_column = targets.tocsc()
    blocks = class_blocks(samples, classes)

    def known(block: slice) -> NDArray[np.float64]:
        return np.nan_to_num(scores(block).astype(np.float64), nan=-1.0)

    held = known(blocks[0]) if len(blocks) == 1 else None
    largest = np.full(samples, -np.inf)
    for block in blocks:
        largest = np.maximum(largest, (known(block) if held is None else held).max(axis=1))
    hits, chosen = np.zeros(samples), np.zeros(samples)
    for block in blocks:
        values = known(block) if held is None else held
        best = values >= largest[:, None] - TIE
        hits += (best & by_column[:, block].toarray()).sum(axis=1)
        chosen += best.sum(axis=1)
    return hits / chosen


def report_classes(
    scores: Scores,
    targets: csr_array,
    names: Sequence[str],
    *,
    unknown: csr_array | None = None,
    multi_label: bool | None = None,
    bootstrap: int,
    seed: int,
    context: str,
    logged: set[tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """AUROC and average precision of each class and their means, with 95% intervals.

    Intervals are percentiles over bootstrap resamples of the samples, the same resamples for
    every class; a resample without a positive (or a negative) of a class leaves that class out.
    Resamples repeat samples, which favours the average precision: its interval lies a little high.
    A class without positives, negatives or finite scores is null, including its accuracy, since a
    constant answer is no result. It is left out of the means and named in the log and under
    `excluded`.

    Args:
        scores: of slices of the classes, larger for the class. Asked for in blocks, so that the
            scores of many classes are never held at once.
        targets: bool [N, L].
        names: the L classes.
        unknown: which labels are unknown, bool [N, L]; such a sample counts in no number of the
            class. None when all are known.
        multi_label: adds the accuracy: with several labels per sample that of each class and their
            mean, else the share of samples whose class is chosen; None leaves it out.
        bootstrap: number of resamples.
        seed: seed of the resampling.
        context: what is measured, for the log.
        logged: lists of excluded classes that are not logged again, such as those of other
            fractions; receives this one.

    Returns:
        `auroc`, `average_precision` (and `accuracy`), each with `<name>_interval`; `classes`
        with the same for each class and its counts; `excluded`.
    """
    samples = targets.shape[0]
    by_column = targets.tocsc()
    positives = np.asarray(targets.sum(axis=0))
    report = undefined(accuracy=multi_label is not None)
    means = {name: ClassMean() for name in (*SCORES, "accuracy")}
    excluded: list[str] = []
    blocks = class_blocks(samples, len(names))
    for block in progress(blocks, context, "blocks of classes"):
        values, hot = scores(block), by_column[:, block].toarray()
        known = None if unknown is None else ~unknown[:, block].toarray()
        count, total = positives[block], known_samples(known, values)
        usable = (count > 0) & (count < total) & np.isfinite(values).all(axis=0)
        excluded += [name for name, use in zip(names[block], usable, strict=True) if not use]
        right = right_decisions(values, hot) if multi_label else None
        exact, drawn, hits = _measure(values, hot, usable, right, bootstrap, seed, known)
        for k, name in enumerate(names[block]):
            entry: dict[str, Any] = {
                "positives": int(count[k]),
                "negatives": int(total[k] - count[k]),
            }
            for s, score in enumerate(SCORES):
                entry[score] = float(exact[k][s]) if k in exact else None
                entry[f"{score}_interval"] = interval(drawn[k][s]) if k in drawn else None
                if k in exact:
                    means[score].add(exact[k][s], drawn[k][s])
            if right is not None:
                seen = samples if known is None else int(total[k])
                hit = (right[:, k] if known is None else right[known[:, k], k]).sum()
                entry["accuracy"] = float(hit / seen) if k in exact else None
                entry["accuracy_interval"] = interval(hits[:, k]) if k in exact else None
                if k in exact:
                    # Summed as halves, which float64 holds exactly, for any blocks of classes.
                    means["accuracy"].add(hit * (samples / seen), hits[:, k])
            report["classes"][name] = entry
    logged = set() if logged is None else logged
    if excluded and tuple(excluded) not in logged:
        logged.add(tuple(excluded))
        logger.warning(
            "%s: left out of the means, for lack of positives, negatives or scores: %s.",
            context,
            shown(excluded, LISTED),
        )
    if multi_label is False and len(excluded) < len(names):
        chosen = right_choices(scores, targets)
        every = [
            counts @ chosen / samples for counts in resamples(samples, number=bootstrap, seed=seed)
        ]
        means["accuracy"].add(chosen.mean(), np.concatenate([np.empty(0), *every]))
    for name, mean in means.items():
        if name in report and mean.exact:
            whole = samples if name == "accuracy" and multi_label else 1
            report[name] = float(np.sum(mean.exact) / (len(mean.exact) * whole))
            report[f"{name}_interval"] = interval(mean.drawn())
    report["excluded"] = excluded
    return report


def known_samples(
    known: NDArray[np.bool_] | None, scores: NDArray[np.floating]
) -> NDArray[np.int64]:
    """How many samples of each class are known to have it or not, [C]."""
    if known is None:
        return np.full(scores.shape[1], len(scores))
    return known.sum(axis=0)


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


class ClassMean:
    """A mean over classes, and in each resample over those that it defines."""

    def __init__(self) -> None:
        self.exact: list[float] = []
        self.total: Any = 0.0
        self.count: Any = 0

    def add(self, exact: float, drawn: NDArray[np.float64]) -> None:
        """Add a class: its value, and that of every resample, [R]."""
        defined = np.isfinite(drawn)
        self.exact.append(float(exact))
        self.total = self.total + np.where(defined, drawn, 0.0)
        self.count = self.count + defined

    def drawn(self) -> NDArray[np.float64]:
        """The mean of each resample that defines one."""
        known = self.count > 0
        found: NDArray[np.float64] = self.total[known] / self.count[known]
        return found


def _measure(
    scores: NDArray[np.floating],
    targets: NDArray[np.bool_],
    usable: NDArray[np.bool_],
    right: NDArray[np.float64] | None,
    bootstrap: int,
    seed: int,
    known: NDArray[np.bool_] | None,
) -> tuple[dict[int, Any], dict[int, Any], NDArray[np.float64]]:
    """Scores of usable classes on the samples, [2], in resamples, [2, R], and their hits."""
    rows = {
        k: slice(None) if known is None else np.flatnonzero(known[:, k])
        for k in map(int, np.flatnonzero(usable))
    }
    ranked = {k: RankedScores(scores[rows[k], k], targets[rows[k], k]) for k in rows}
    weight = None if known is None else known.astype(np.float64)
    drawn: dict[int, list[Any]] = {k: [np.empty((len(SCORES), 0))] for k in ranked}
    hits = [np.empty((0, scores.shape[1]))]
    for counts in resamples(len(targets), number=bootstrap, seed=seed) if ranked else ():
        for k, ranking in ranked.items():
            drawn[k].append(np.stack(ranking.measure(counts[:, rows[k]])))
        if right is not None and weight is None:
            hits.append(counts @ right / len(right))
        elif right is not None and weight is not None:
            with np.errstate(invalid="ignore"):  # none of those drawn is known
                hits.append(counts @ (right * weight) / (counts @ weight))
    exact = {k: np.concatenate(ranking.measure()) for k, ranking in ranked.items()}
    spread = {k: np.concatenate(parts, axis=1) for k, parts in drawn.items()}
    return exact, spread, np.concatenate(hits)
