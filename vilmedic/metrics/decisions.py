"""Classifier metrics: ranking, decisions at a threshold, calibration."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import expit, softmax

from vilmedic.config.types import Between, Resamples
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.metrics.classification import (
    TIE,
    ClassMean,
    class_blocks,
    interval,
    report_classes,
    resamples,
    undefined,
)
from vilmedic.metrics.contract import Metric
from vilmedic.models.contract import LOGITS

logger = logging.getLogger(__name__)

DECISIONS = ("f1", "mcc", "calibration_error")
Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Classification(Metric):
    """AUROC, average precision, F1, MCC and calibration error of a model that classifies.

    Probabilities are sigmoids of the logits, or their softmax when a sample has one label; several
    checkpoints count with their mean logits. A class is decided at the threshold that is best on
    `threshold_split`, half-way between the two scores that it parts; of equally good ones the
    highest. It never looks at the split that is measured, unless that is the same one. With one
    label per sample, each class is decided against all others.

    The calibration error of a class is the mean distance between probability and share of positives
    in bins of equal width, weighted by their samples (Naeini et al. 2015). A class without
    positives or negatives has no numbers, as in the other protocols.

    Args:
        threshold_split: the split on which thresholds are chosen.
        threshold_by: what the chosen threshold makes largest there.
        bins: bins of the calibration error.
        bootstrap: resamples behind each 95% interval; 0 leaves intervals out. Thresholds stay as
            they are chosen.
    """

    numbers: ClassVar = {
        "auroc": "higher",
        "average_precision": "higher",
        "accuracy": "higher",
        "f1": "higher",
        "mcc": "higher",
        "calibration_error": "lower",
    }

    def __init__(
        self,
        *,
        threshold_split: str = "validate",
        threshold_by: Literal["f1", "mcc"] = "f1",
        bins: Annotated[int, Between(1, 1000)] = 15,
        bootstrap: Resamples = 1000,
    ) -> None:
        self.threshold_split = threshold_split
        self.threshold_by = threshold_by
        self.bins = bins
        self.bootstrap = bootstrap

    def check(self, evaluation: Evaluation) -> None:
        """Refuse a model without logits, and a split that is not there."""
        evaluation.check_feature(LOGITS)
        if self.threshold_split != evaluation.split:
            evaluation.networks.dataset(self.threshold_split)

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """The numbers, each with `<name>_interval`, and `classes` with the same for each class.

        All are None for data without labels, and for baselines, which give no logits.
        """
        split = evaluation.features
        logits = evaluation.feature(LOGITS)
        if split.labels is None:
            logger.warning(
                "classification: no labels on the split '%s', so it is null. Add %s",
                evaluation.split,
                LABEL_OVERRIDES,
            )
        nothing = undefined(accuracy=True)
        for name in DECISIONS:
            nothing |= {name: None, f"{name}_interval": None}
        if logits is None or split.labels is None:
            return nothing
        scores = probabilities(logits, split.multi_label)[evaluation.repeats("image").numpy()]
        report = nothing | report_classes(
            lambda block: scores[:, block],
            split.labels,
            split.label_names,
            unknown=split.unknown,
            multi_label=split.multi_label,
            bootstrap=self.bootstrap,
            seed=evaluation.seed,
            context=f"classification, {evaluation.name}, split {evaluation.split}",
        )
        thresholds = self._thresholds(evaluation)
        self._decide(report, scores, split, thresholds, evaluation.seed)
        evaluation.record_scores(lambda block: scores[:, block], split.label_names)
        evaluation.record(thresholds=thresholds)
        return report

    def _thresholds(self, evaluation: Evaluation) -> Array:
        """The best threshold of each class, not-a-number where there is none: [L]."""
        other = evaluation.other(self.threshold_split)
        logits = evaluation.feature(LOGITS, self.threshold_split)
        classes = len(evaluation.features.label_names)
        if logits is None or other.labels is None:
            return np.full(classes, np.nan)
        scores = probabilities(logits, other.multi_label)
        found = []
        for block in class_blocks(len(scores), classes):
            hot, known = _targets(other, block)
            for k in range(hot.shape[1]):
                rows = known[:, k]
                some = scores[rows, block.start + k]
                found.append(best_threshold(some, hot[rows, k], self.threshold_by))
        return np.array(found)

    def _decide(
        self,
        report: dict[str, Any],
        scores: Array,
        split: SplitFeatures,
        thresholds: Array,
        seed: int,
    ) -> None:
        """Add what decisions and calibration are worth to the report, class by class."""
        means = {name: ClassMean() for name in DECISIONS}
        everyone = np.ones((1, len(scores)))
        for block in class_blocks(len(scores), scores.shape[1]):
            hot, known = _targets(split, block)
            drawn: dict[str, list[Array]] = {name: [] for name in DECISIONS}
            part, cut = scores[:, block], thresholds[block]
            exact = self._measure(part, hot, known, cut, everyone)
            for counts in resamples(len(scores), number=self.bootstrap, seed=seed):
                for name, value in self._measure(part, hot, known, cut, counts).items():
                    drawn[name].append(value)
            for k, label in enumerate(split.label_names[block]):
                entry = report["classes"][label]
                there = np.isfinite(cut[k])
                entry["threshold"] = float(cut[k]) if there else None
                for name in DECISIONS:
                    value = exact[name][0, k]
                    usable = label not in report["excluded"] and np.isfinite(value)
                    spread = np.concatenate([np.empty(0), *(one[:, k] for one in drawn[name])])
                    entry[name] = float(value) if usable else None
                    entry[f"{name}_interval"] = interval(spread) if usable else None
                    if usable:
                        means[name].add(value, spread)
        for name, mean in means.items():
            if mean.exact:
                report[name] = float(np.mean(mean.exact))
                report[f"{name}_interval"] = interval(mean.drawn())

    def _measure(
        self, scores: Array, hot: Flags, known: Flags, thresholds: Array, counts: Array
    ) -> dict[str, Array]:
        """F1, MCC and calibration error of weighted samples, each [R, C]."""
        with np.errstate(invalid="ignore"):
            chosen = scores >= thresholds
        right, wrong = chosen & hot & known, chosen & ~hot & known
        tp, fp = counts @ right, counts @ wrong
        positives, total = counts @ (hot & known), counts @ known.astype(np.float64)
        f1, mcc = f1_and_mcc(tp, fp, positives, total)
        f1[:, np.isnan(thresholds)] = np.nan
        mcc[:, np.isnan(thresholds)] = np.nan
        error = np.zeros_like(tp)
        place = np.minimum((scores * self.bins).astype(np.int64), self.bins - 1)
        for number in range(self.bins):
            inside = (place == number) & known
            if inside.any():
                error += np.abs(counts @ np.where(inside, scores - hot, 0.0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"f1": f1, "mcc": mcc, "calibration_error": error / total}


def probabilities(logits: torch.Tensor, multi_label: bool) -> Array:
    """Probabilities of classes, float64 [N, L], of logits [N, L]."""
    exact = logits.double().numpy()
    found: Array = expit(exact) if multi_label else softmax(exact, axis=1)
    return found


def f1_and_mcc(tp: Array, fp: Array, positives: Array, total: Array) -> tuple[Array, Array]:
    """F1 and the correlation coefficient of Matthews (1975), of numbers of samples.

    Args:
        tp: positives that were chosen.
        fp: negatives that were chosen.
        positives: all positives.
        total: all samples.

    Returns:
        F1 is not a number without positives. MCC is 0 where all, or none, are chosen, and not a
        number without positives or without negatives.
    """
    fn = positives - tp
    tn = total - positives - fp
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(positives > 0, 2 * tp / (2 * tp + fp + fn), np.nan)
        size = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        mcc = np.where(size > 0, (tp * tn - fp * fn) / size, 0.0)
    mcc = np.where((positives > 0) & (positives < total), mcc, np.nan)
    return f1, mcc


def best_threshold(scores: Array, targets: Flags, by: Literal["f1", "mcc"]) -> float:
    """The threshold from which on samples are chosen, best by F1 or MCC.

    Args:
        scores: [N].
        targets: [N].
        by: what is made largest.

    Returns:
        Half-way between two neighbouring scores, or the smallest score where all are chosen;
        not a number without positives or negatives.
    """
    positives = int(targets.sum())
    if not 0 < positives < len(targets):
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.flatnonzero(np.append(-np.diff(ranked) > TIE, True))
    tp = np.cumsum(targets[order])[ends].astype(np.float64)
    fp = ends + 1 - tp
    values = f1_and_mcc(tp, fp, np.full_like(tp, positives), np.full_like(tp, len(targets)))
    best = int(np.argmax(values[by == "mcc"]))
    last = ends[best]
    return float(ranked[last] if last + 1 == len(ranked) else (ranked[last] + ranked[last + 1]) / 2)


def _targets(split: SplitFeatures, block: slice) -> tuple[Flags, Flags]:
    """Which samples have some of the classes, and of which that is known: bool [N, C]."""
    labels: csr_array = split.labels
    hot = labels.tocsc()[:, block].toarray()
    if split.unknown is None:
        return hot, np.ones_like(hot)
    return hot, ~split.unknown.tocsc()[:, block].toarray()
