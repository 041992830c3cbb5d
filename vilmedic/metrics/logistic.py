"""Penalised logistic regression for all classes at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ITERATIONS = 200
TOLERANCE = 1e-5


class LogisticRegression:
    """Logistic regression with an L2 penalty, fitted to the optimum by L-BFGS.

    Minimises sum of log losses + |W|^2 / (2 C), the objective of scikit-learn's class, for one
    binary task a class or for one multinomial task. As there, one label a sample and two classes
    are one binary task, of the second class: a multinomial one would have the weights w / 2 and
    -w / 2 in place of w, half of the penalty. Fitting all classes in one product of matrices is
    several times faster than one after the other.

    Args:
        x: features [N, D], standardised by the caller.
        y: labels [N, L], zeros and ones; with one label a sample one 1 a row.
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
        y: Tensor,
        *,
        strength: float,
        multi_label: bool,
        start: LogisticRegression | None = None,
    ) -> None:
        self.multi_label = multi_label
        self.learned = y.any(dim=0) & (~y.all(dim=0))
        self.classes = y.shape[1]
        targets = y[:, self.learned].to(x.dtype)
        self.pair = not multi_label and targets.shape[1] == 2
        if self.pair:
            targets = targets[:, 1:]
        shape = (x.shape[1], targets.shape[1])
        self.weight: Tensor = x.new_zeros(shape) if start is None else start.weight.clone()
        self.bias: Tensor = x.new_zeros(shape[1]) if start is None else start.bias.clone()
        if targets.shape[1]:
            self._minimise(x, targets, penalty=1 / (2 * strength * len(x)))

    def _minimise(self, x: Tensor, targets: Tensor, penalty: float) -> None:
        parameters = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=ITERATIONS,
            tolerance_grad=TOLERANCE,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            logits = x @ self.weight + self.bias
            if self.multi_label or self.pair:
                loss = functional.binary_cross_entropy_with_logits(
                    logits, targets, reduction="sum"
                ) / len(x)
            else:
                loss = functional.cross_entropy(logits, targets)
            loss = loss + penalty * self.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(objective)
        self.weight, self.bias = self.weight.detach(), self.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """Probabilities [N, L], float64; not-a-number for classes the fitted samples lack."""
        # In float64, where equal samples differ by less than what counts as a tie.
        logits = x.double() @ self.weight.double() + self.bias.double()
        scores = logits.new_full((len(x), self.classes), torch.nan)
        if self.pair:
            logits = torch.cat([-logits, logits], dim=1)
        binary = self.multi_label or self.pair
        scores[:, self.learned] = logits.sigmoid() if binary else logits.softmax(dim=1)
        return scores
