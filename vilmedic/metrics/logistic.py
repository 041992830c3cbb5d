"""Penalised logistic regression for all classes at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from vilmedic.distributed.launch import is_main_process
from vilmedic.metrics import classification
from vilmedic.metrics.classification import Scores

ITERATIONS = 200
TOLERANCE = 1e-5
HISTORY = 1 << 27
"""Most numbers that a fit remembers of its last steps; of few classes it keeps ten steps."""


class LogisticRegression:
    """Logistic regression with an L2 penalty, fitted to the optimum by L-BFGS.

    Minimises sum of log losses + |W|^2 / (2 C), the objective of scikit-learn's class, for one
    binary task a class or for one multinomial task. As there, one label a sample and two classes
    are one binary task, of the second class: a multinomial one would have the weights w / 2 and
    -w / 2 in place of w, half of the penalty. Fitting all classes in one product of matrices is
    several times faster than one after the other; very many are fitted in blocks, as they depend on
    each other by no more than the place where the fit stops, and those of a multinomial task, which
    do, in blocks of samples.

    Args:
        x: features [N, D], standardised by the caller.
        y: labels, bool [N, L]; with one label a sample one a row.
        strength: C, the inverse of the penalty; the intercept is not penalised.
        multi_label: whether the classes are tasks of their own.
        start: a fit to begin from.

    Attributes:
        weight: coefficients [D, T] of T tasks, those classes that the labels tell apart; one task
            for two classes with one label a sample.
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
        alone = None if len(tasks) > 1 and is_main_process() else True
        for block in tqdm(tasks, desc="Linear probe", unit="block", leave=False, disable=alone):
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


def _softmax_terms(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample the largest logit, and the sum of the exponentials of all less it: [N, 1]."""
    largest, total = [], []
    for rows in classification.class_blocks(weight.shape[1], len(x)):
        logits = x[rows] @ weight + bias
        largest.append(logits.amax(dim=1, keepdim=True))
        total.append((logits - largest[-1]).exp().sum(dim=1, keepdim=True))
    return torch.cat(largest), torch.cat(total)
