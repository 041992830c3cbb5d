"""Linear probe: logistic regression on frozen features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional

from vilmedic.config.types import Portion, Resamples
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.log import progress
from vilmedic.metrics import classification
from vilmedic.metrics.classification import Scores, class_blocks, report_classes, undefined
from vilmedic.metrics.contract import Metric

logger = logging.getLogger(__name__)

# Features are standardised, so one grid serves every width and scale of them.
GRID = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 0.2
ITERATIONS = 200
TOLERANCE = 1e-5
HISTORY = 1 << 27
"""Most numbers that a fit remembers of its last steps; of few classes it keeps ten steps."""


class LinearProbe(Metric):
    """Logistic regression on frozen features of the training split.

    Features are standardised by the samples that are fitted. Several labels per sample: one binary
    regression a class; one label: one binary regression for two classes, one multinomial for more;
    C is that of scikit-learn's LogisticRegression in all of them. The strength of the L2 penalty is
    chosen once for all classes among C = 1e-4, 1e-3, 1e-2, 1e-1 by the log loss on a fifth of the
    fitted samples, then all of them are fitted; no other split is looked at. Accuracy is the
    share of right decisions at probability one half, the mean over classes, or of right classes
    when a sample has one label; a tie counts by the share of its decisions that are right. Labels
    that are unknown count as absent where the probe is fitted, and not at all where it is scored.
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
        evaluation.check_feature(self.features, "features")
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
        reports = []
        logged: set[tuple[str, ...]] = set()
        for fraction, probe in zip(self.fractions, probes, strict=True):
            report = report_classes(
                probe.scores(x),
                split.labels,
                split.label_names,
                unknown=split.unknown,
                multi_label=split.multi_label,
                bootstrap=self.bootstrap,
                seed=evaluation.seed,
                context=f"linear_probe, {evaluation.name}, split {split.split}",
                logged=logged,
            )
            fit = {"fraction": fraction, "samples": probe.samples, "C": probe.strength}
            reports.append({"fit": fit} | report)
        evaluation.record_scores(probes[-1].scores(x), split.label_names)
        return reports[-1] | {"fractions": reports}

    def _probes(self, evaluation: Evaluation) -> list[Probe] | None:
        """The fitted probes of all fractions, kept for the next split of the same networks."""
        fit = evaluation.other(self.fit_split)
        if self._fitted is None or self._fitted[0] is not fit:
            value = evaluation.feature(self.features, self.fit_split)
            if value is None or fit.labels is None:
                return None
            x, y = value.flatten(1), fit.labels
            taken = nested_subsets(len(x), self.fractions, evaluation.seed)
            probes = [Probe(x[rows], y[rows.numpy()], fit.multi_label) for rows in taken]
            self._fitted = (fit, probes)
        return self._fitted[1]


class Probe:
    """Standardisation and logistic regression, fitted.

    Args:
        x: features [N, D].
        y: labels, bool [N, L].
        multi_label: whether a sample may have several.
    """

    def __init__(self, x: Tensor, y: csr_array, multi_label: bool) -> None:
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
            losses.append(_log_loss(model.scores(x[:held_out]), y[:held_out]))
        self.strength = GRID[losses.index(min(losses))]
        self.model = LogisticRegression(x, y, strength=self.strength, multi_label=multi_label)

    def scores(self, x: Tensor) -> Scores:
        """Probabilities; not-a-number for classes that the fitted samples do not hold."""
        return self.model.scores(self._standardise(x))

    def _standardise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.spread


def read_fractions(fractions: Sequence[float] | None) -> list[float]:
    """The shares in ascending order; all labels when there are none.

    Args:
        fractions: shares, each above 0 and at most 1.
    """
    return sorted(set(fractions or [1.0]))


def nested_subsets(size: int, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Rows of each share of a split: prefixes of one seeded permutation, two rows at least.

    Args:
        size: number of samples of the split.
        fractions: the shares.
        seed: seed of the permutation.

    Returns:
        For each share its rows, int64; the smaller lie within the larger.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return [order[: max(2, round(share * size))] for share in fractions]


class LogisticRegression:
    """Logistic regression with an L2 penalty, fitted to the optimum by L-BFGS.

    Minimises sum of log losses + |W|^2 / (2 C), the objective of scikit-learn's class, for one
    binary task per class or for one multinomial task. As there, one label per sample and two
    classes are one binary task, of the second class: a multinomial one would have the weights w / 2
    and -w / 2 in place of w, half of the penalty. Fitting all classes in one product of matrices is
    several times faster than one after the other; very many are fitted in blocks, as they depend on
    each other by no more than the place where the fit stops, and those of a multinomial task, which
    do, in blocks of samples.

    Args:
        x: features [N, D], standardised by the caller.
        y: labels, bool [N, L]; with one label per sample one per row.
        strength: C, the inverse of the penalty; the intercept is not penalised.
        multi_label: whether the classes are tasks of their own.
        start: a fit to begin from.

    Attributes:
        weight: coefficients [D, T] of T tasks, those classes that the labels tell apart; one task
            for two classes with one label per sample.
        bias: intercepts [T].
    """

    def __init__(
        self,
        x: Tensor,
        y: csr_array,
        *,
        strength: float,
        multi_label: bool,
        start: LogisticRegression | None = None,
    ) -> None:
        self.multi_label = multi_label
        count = np.asarray(y.sum(axis=0))
        self.learned = np.flatnonzero((count > 0) & (count < len(x)))
        self.classes = y.shape[1]
        targets = y.tocsc()[:, self.learned]
        self.pair = not multi_label and targets.shape[1] == 2
        if self.pair:
            targets = targets[:, 1:]
        shape = (x.shape[1], targets.shape[1])
        self.weight: Tensor = x.new_zeros(shape) if start is None else start.weight.clone()
        self.bias: Tensor = x.new_zeros(shape[1]) if start is None else start.bias.clone()
        penalty = 1 / (2 * strength * len(x))
        tasks = classification.class_blocks(len(x), shape[1]) if multi_label else [slice(None)]
        for block in progress(tasks, "Linear probe", "blocks of classes"):
            if shape[1]:
                self._minimise(x, targets[:, block].tocsr(), block, penalty)

    def _minimise(self, x: Tensor, targets: csr_array, block: slice, penalty: float) -> None:
        weight, bias = self.weight[:, block].clone(), self.bias[block].clone()
        parameters = [weight.requires_grad_(), bias.requires_grad_()]
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=ITERATIONS,
            history_size=min(10, max(2, HISTORY // (2 * weight.numel()))),
            tolerance_grad=TOLERANCE,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        parts = classification.class_blocks(targets.shape[1], len(x))
        whole = self._dense(targets, x) if len(parts) == 1 else None

        def objective() -> Tensor:
            optimizer.zero_grad()
            total = penalty * weight.square().sum()
            total.backward()
            for rows in parts:
                y = self._dense(targets[rows], x) if whole is None else whole
                logits = x[rows] @ weight + bias
                if self.multi_label or self.pair:
                    loss = functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
                else:
                    loss = functional.cross_entropy(logits, y, reduction="sum")
                loss = loss / len(x)
                loss.backward()
                total = total.detach() + loss.detach()
            return total

        with torch.enable_grad():
            optimizer.step(objective)
        self.weight[:, block], self.bias[block] = weight.detach(), bias.detach()

    @staticmethod
    def _dense(targets: csr_array, like: Tensor) -> Tensor:
        return torch.from_numpy(targets.toarray()).to(like.dtype)

    def scores(self, x: Tensor) -> Scores:
        """Probabilities of samples [N, D].

        Returns:
            Gives those of a slice of the classes, float64 [N, C]; not-a-number for classes that
            the fitted samples lack.
        """
        # In float64, where equal samples differ by less than what counts as a tie.
        x, weight, bias = x.double(), self.weight.double(), self.bias.double()
        if self.pair:
            weight, bias = torch.cat([-weight, weight], dim=1), torch.cat([-bias, bias])
        binary = self.multi_label or self.pair
        softmax = None if binary else _softmax_terms(x, weight, bias)

        def probabilities(block: slice) -> NDArray[np.float64]:
            first, last, _ = block.indices(self.classes)
            found = np.full((len(x), last - first), np.nan)
            tasks = slice(*np.searchsorted(self.learned, (first, last)).tolist())
            logits = x @ weight[:, tasks] + bias[tasks]
            known = logits.sigmoid()
            if softmax is not None:
                known = (logits - softmax[0]).exp() / softmax[1]
            found[:, self.learned[tasks] - first] = known.numpy()
            return found

        return probabilities


def _log_loss(scores: Scores, y: csr_array) -> float:
    """Mean log loss over the classes that have scores."""
    samples, classes = y.shape
    by_column, total = y.tocsc(), 0.0
    for block in class_blocks(samples, classes):
        values = scores(block)
        likelihood = np.where(by_column[:, block].toarray(), values, 1 - values)
        total -= np.log(np.nan_to_num(likelihood, nan=1.0).clip(min=1e-12)).sum()
    return float(total / (samples * classes))


def _softmax_terms(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample the largest logit, and the sum of the exponentials of all less it: [N, 1]."""
    largest, total = [], []
    for rows in classification.class_blocks(weight.shape[1], len(x)):
        logits = x[rows] @ weight + bias
        largest.append(logits.amax(dim=1, keepdim=True))
        total.append((logits - largest[-1]).exp().sum(dim=1, keepdim=True))
    return torch.cat(largest), torch.cat(total)
