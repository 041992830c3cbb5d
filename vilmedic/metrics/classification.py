"""The numbers that every protocol with class scores reports."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilmedic.metrics.bootstrap import TIE, RankedScores, interval, resamples

logger = logging.getLogger(__name__)

SCORES = ("auroc", "average_precision")


def undefined(*, accuracy: bool = False) -> dict[str, Any]:
    """The report of a protocol that the features or the data do not allow."""
    names = (*SCORES, "accuracy") if accuracy else SCORES
    report: dict[str, Any] = {}
    for name in names:
        report |= {name: None, f"{name}_interval": None}
    return report | {"classes": {}, "excluded": []}


def right_decisions(
    scores: NDArray[np.floating], targets: NDArray[np.bool_], *, multi_label: bool
) -> NDArray[np.float64]:
    """How far the decisions that scores make are right.

    A score of exactly one half decides nothing and counts one half; classes that share the largest
    score of a sample share its decision. Scores closer than `TIE` are equal.

    Args:
        scores: shares or probabilities, [N, L]; a class without scores is never chosen.
        targets: [N, L].
        multi_label: whether each class is decided on its own, at one half, or the class with the
            largest score is the decision.

    Returns:
        0 to 1, [N, L] with several labels a sample, else [N, 1].
    """
    known = np.nan_to_num(scores.astype(np.float64), nan=-1.0)
    if multi_label:
        tied = np.abs(known - 0.5) <= TIE
        return np.where(tied, 0.5, (known > 0.5) == targets)
    chosen = known >= known.max(axis=1, keepdims=True) - TIE
    right: NDArray[np.float64] = (chosen & targets).sum(axis=1) / chosen.sum(axis=1)
    return right[:, None]


def report_classes(
    scores: NDArray[np.floating],
    targets: NDArray[np.bool_],
    names: Sequence[str],
    *,
    correct: NDArray[np.floating] | NDArray[np.bool_] | None = None,
    bootstrap: int,
    seed: int,
    context: str,
) -> dict[str, Any]:
    """AUROC and average precision of each class and their means, with 95% intervals.

    Intervals are percentiles over bootstrap resamples of the samples, the same resamples for
    every class; a resample without a positive (or a negative) of a class leaves that class out.
    Resamples repeat samples, which favours the average precision: its interval lies a little high.
    A class that has none in the data, or no finite scores, is null, its accuracy included: to say
    always the same is no result. It is left out of the means and is named in the log and under
    `excluded`.

    Args:
        scores: [N, L], larger for the class.
        targets: [N, L].
        names: the L classes.
        correct: how far decisions were right, as `right_decisions` says, [N, L], or [N, 1] when a
            sample has one label; adds the accuracy, and with [N, L] that of each class.
        bootstrap: number of resamples.
        seed: seed of the resampling.
        context: what is measured, for the log.

    Returns:
        `auroc`, `average_precision` (and `accuracy`), each with `<name>_interval`; `classes`
        with the same for each class and its counts; `excluded`.
    """
    positives = targets.sum(axis=0)
    usable = (positives > 0) & (positives < len(targets)) & np.isfinite(scores).all(axis=0)
    excluded = [name for name, use in zip(names, usable, strict=True) if not use]
    if excluded:
        logger.warning(
            "%s: left out of the means, for lack of positives, negatives or scores: %s.",
            context,
            ", ".join(excluded),
        )
    ranked = {
        k: RankedScores(scores[:, k], targets[:, k]) for k in map(int, np.flatnonzero(usable))
    }
    drawn: dict[int, list[Any]] = {k: [] for k in ranked}
    hits = []
    for counts in resamples(len(targets), number=bootstrap, seed=seed):
        for k, ranking in ranked.items():
            drawn[k].append(np.stack(ranking.measure(counts)))
        if correct is not None:
            hits.append(counts @ correct / len(correct))

    exact = {k: np.concatenate(ranking.measure()) for k, ranking in ranked.items()}
    none = np.empty((len(SCORES), 0))
    spread = {k: np.concatenate([none, *parts], axis=1) for k, parts in drawn.items()}
    report = undefined(accuracy=correct is not None)
    for s, score in enumerate(SCORES):
        if ranked:
            report[score] = float(np.mean([values[s] for values in exact.values()]))
            every_class = np.stack([values[s] for values in spread.values()])
            defined = np.isfinite(every_class)
            count = defined.sum(axis=0)
            total = np.where(defined, every_class, 0.0).sum(axis=0)
            report[f"{score}_interval"] = interval(total[count > 0] / count[count > 0])
    if correct is not None:
        hit_rates = np.concatenate([np.empty((0, correct.shape[1])), *hits])
        counted = usable if correct.shape[1] == len(names) else usable.any(keepdims=True)
        if counted.any():
            report["accuracy"] = float(correct[:, counted].mean())
            report["accuracy_interval"] = interval(hit_rates[:, counted].mean(axis=1))

    for k, name in enumerate(names):
        entry: dict[str, Any] = {
            "positives": int(positives[k]),
            "negatives": int(len(targets) - positives[k]),
        }
        for s, score in enumerate(SCORES):
            entry[score] = float(exact[k][s]) if k in exact else None
            entry[f"{score}_interval"] = interval(spread[k][s]) if k in spread else None
        if correct is not None and correct.shape[1] == len(names):
            entry["accuracy"] = float(correct[:, k].mean()) if k in exact else None
            entry["accuracy_interval"] = interval(hit_rates[:, k]) if k in exact else None
        report["classes"][name] = entry
    report["excluded"] = excluded
    return report
