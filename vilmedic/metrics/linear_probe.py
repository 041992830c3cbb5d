"""Linear probe: how much of the labels a linear classifier reads off frozen features."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilmedic.config.types import Portion, Resamples
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.metrics.classification import report_classes, right_decisions, undefined
from vilmedic.metrics.contract import Metric
from vilmedic.metrics.fractions import nested_subsets, read_fractions
from vilmedic.metrics.logistic import LogisticRegression

logger = logging.getLogger(__name__)

# Features are standardised, so one grid serves every width and scale of them.
GRID = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 0.2


class LinearProbe(Metric):
    """Logistic regression on frozen features of the training split.

    Features are standardised by the samples that are fitted. Several labels a sample: one binary
    regression a class; one label: one binary regression for two classes, one multinomial for more;
    C is that of scikit-learn's LogisticRegression in all of them. The strength of the L2 penalty is
    chosen once for all classes among C = 1e-4, 1e-3, 1e-2, 1e-1 by the log loss on a fifth of the
    fitted samples, then all of them are fitted; no other split is looked at. Accuracy is the
    share of right decisions at probability one half, the mean over classes, or of right classes
    when a sample has one label; a tie counts by the share of its decisions that are right.
    Fractions are prefixes of one seeded permutation, so the smaller lie within the larger.

    Args:
        features: the feature that is probed.
        fractions: shares of the training labels to fit, such as 0.01, 0.1 and 1.0; the largest
            gives the headline numbers.
        fit_split: the split that is fitted.
        bootstrap: resamples behind each 95% interval; 0 leaves intervals out.
    """

    numbers: ClassVar = {"auroc": "higher", "average_precision": "higher", "accuracy": "higher"}

    def __init__(
        self,
        *,
        features: str = "visual_backbone",
        fractions: list[Portion] | None = None,
        fit_split: str = "train",
        bootstrap: Resamples = 1000,
    ) -> None:
        self.features = features
        self.fractions = read_fractions(fractions)
        self.fit_split = fit_split
        self.bootstrap = bootstrap
        self._fitted: tuple[SplitFeatures, list[Probe]] | None = None

    def check(self, evaluation: Evaluation) -> None:
        """Refuse a feature that the model does not give, and a split that is not there."""
        evaluation.check_feature(self.features, "linear_probe.features")
        if self.fit_split != evaluation.split:
            evaluation.networks.dataset(self.fit_split)

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`auroc`, `average_precision`, `accuracy` with intervals, `classes`, and `fractions`.

        All are None for features or data that do not allow them.
        """
        split = evaluation.features
        if split.labels is None:
            logger.warning(
                "linear_probe: no labels on the split '%s', so it is null. Add %s",
                evaluation.split,
                LABEL_OVERRIDES,
            )
            return undefined(accuracy=True) | {"fractions": []}
        value = evaluation.feature(self.features)
        probes = None if value is None else self._probes(evaluation)
        if value is None or probes is None:
            return undefined(accuracy=True) | {"fractions": []}
        x = value.flatten(1)[evaluation.repeats("image")]
        targets = split.labels.numpy().astype(np.bool_)
        reports = []
        for fraction, probe in zip(self.fractions, probes, strict=True):
            scores = probe.scores(x)
            report = report_classes(
                scores,
                targets,
                split.label_names,
                correct=right_decisions(scores, targets, multi_label=split.multi_label),
                bootstrap=self.bootstrap,
                seed=evaluation.seed,
                context=f"linear_probe, {evaluation.name}, split {split.split}",
            )
            fit = {"fraction": fraction, "samples": probe.samples, "C": probe.strength}
            reports.append({"fit": fit} | report)
        return reports[-1] | {"fractions": reports}

    def _probes(self, evaluation: Evaluation) -> list[Probe] | None:
        """The fitted probes of all fractions, kept for the next split of the same networks."""
        fit = evaluation.other(self.fit_split)
        if self._fitted is None or self._fitted[0] is not fit:
            value = evaluation.feature(self.features, self.fit_split)
            if value is None or fit.labels is None:
                return None
            x, y = value.flatten(1), fit.labels.bool()
            taken = nested_subsets(len(x), self.fractions, evaluation.seed)
            self._fitted = (fit, [Probe(x[rows], y[rows], fit.multi_label) for rows in taken])
        return self._fitted[1]


class Probe:
    """Standardisation and logistic regression, fitted.

    Args:
        x: features [N, D].
        y: labels [N, L], true where a sample has the label.
        multi_label: whether a sample may have several.
    """

    def __init__(self, x: Tensor, y: Tensor, multi_label: bool) -> None:
        self.samples = len(x)
        self.spread, self.mean = torch.std_mean(x, dim=0, correction=0)
        # What varies by rounding alone is constant; scaling it up would make labels of noise.
        self.spread[self.spread <= 1e-6 * self.mean.abs()] = 1.0
        x = self._standardise(x)
        held_out = max(1, round(HELD_OUT * len(x)))
        losses, model = [], None
        for strength in GRID:
            model = LogisticRegression(
                x[held_out:], y[held_out:], strength=strength, multi_label=multi_label, start=model
            )
            losses.append(_log_loss(model(x[:held_out]), y[:held_out]))
        self.strength = GRID[losses.index(min(losses))]
        self.model = LogisticRegression(x, y, strength=self.strength, multi_label=multi_label)

    def scores(self, x: Tensor) -> NDArray[np.float64]:
        """Probabilities [N, L]; not-a-number for classes that the fitted samples do not hold."""
        return self.model(self._standardise(x)).numpy()

    def _standardise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.spread


def _log_loss(scores: Tensor, y: Tensor) -> float:
    """Mean log loss over the classes that have scores."""
    likelihood = torch.where(y, scores, 1 - scores).double()
    return -likelihood.nan_to_num(nan=1.0).clamp(min=1e-12).log().mean().item()
