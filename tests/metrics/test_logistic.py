from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference
from torch import Tensor

from tests.evaluations import random, sparse
from vilmedic.metrics import classification, logistic
from vilmedic.metrics.logistic import LogisticRegression


def fit(x: Tensor, y: Tensor, **options: Any) -> LogisticRegression:
    return LogisticRegression(x, sparse(y), **options)


def probabilities(model: LogisticRegression, x: Tensor) -> Tensor:
    return torch.from_numpy(model.scores(x)(slice(None)))


def objective(weight: Tensor, log_losses: Tensor, strength: float) -> float:
    """scikit-learn's: the sum of log losses and |W|^2 / (2 C)."""
    return float(log_losses.sum() + weight.square().sum() / (2 * strength))


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_binary_tasks_agree_with_scikit_learn(strength: float) -> None:
    x = random(200, 10).double()
    y = x @ random(10, 3, seed=1).double() + random(200, 3, seed=2) > 0.5
    ours = fit(x, y, strength=strength, multi_label=True)
    for column in range(3):
        theirs = Reference(C=strength, tol=1e-8).fit(x.numpy(), y[:, column].numpy())
        expected = torch.from_numpy(theirs.predict_proba(x.numpy())[:, 1])
        torch.testing.assert_close(
            probabilities(ours, x)[:, column].double(), expected.double(), atol=1e-4, rtol=0
        )
        coefficients = torch.from_numpy(theirs.coef_[0])
        torch.testing.assert_close(ours.weight[:, column], coefficients, atol=1e-4, rtol=0)
        assert ours.bias[column].item() == pytest.approx(theirs.intercept_[0], abs=1e-4)
        losses = torch.where(
            y[:, column], probabilities(ours, x)[:, column], 1 - probabilities(ours, x)[:, column]
        ).log()
        reached = objective(ours.weight[:, column], -losses, strength)
        least = objective(
            coefficients, -torch.where(y[:, column], expected, 1 - expected).log(), strength
        )
        assert reached == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_one_label_of_several_agrees_with_scikit_learn(classes: int, strength: float) -> None:
    x = random(200, 10).double()
    noise = random(200, classes, seed=2)
    target = (x @ random(10, classes, seed=1).double() + noise).argmax(dim=1)
    y = torch.nn.functional.one_hot(target, classes).bool()
    ours = fit(x, y, strength=strength, multi_label=False)
    theirs = Reference(C=strength, tol=1e-8).fit(x.numpy(), target.numpy())
    expected = torch.from_numpy(theirs.predict_proba(x.numpy()))
    torch.testing.assert_close(
        probabilities(ours, x).double(), expected.double(), atol=1e-4, rtol=0
    )
    coefficients = torch.from_numpy(theirs.coef_.T)
    torch.testing.assert_close(ours.weight, coefficients, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        ours.bias - ours.bias.mean() * (classes > 2),
        torch.from_numpy(theirs.intercept_ - theirs.intercept_.mean() * (classes > 2)),
        atol=1e-4,
        rtol=0,
    )
    reached = objective(ours.weight, -probabilities(ours, x)[y].log(), strength)
    assert reached == pytest.approx(objective(coefficients, -expected[y].log(), strength), rel=1e-6)


@pytest.mark.parametrize("multi_label", [True, False])
def test_a_class_that_is_not_there_has_no_scores(multi_label: bool) -> None:
    x = random(20, 3)
    y = torch.zeros(20, 3, dtype=torch.bool)
    y[:10, 0] = y[10:, 2] = True
    scores = probabilities(fit(x, y, strength=0.1, multi_label=multi_label), x)
    assert scores[:, 1].isnan().all()
    assert scores[:, [0, 2]].isfinite().all()


def test_fits_under_inference_mode() -> None:
    x = random(20, 3)
    with torch.no_grad():
        fitted = fit(x, x[:, :1] > 0, strength=1.0, multi_label=True)
    assert ((probabilities(fitted, x) > 0.5) == (x[:, :1] > 0)).float().mean() > 0.9


@pytest.mark.parametrize("multi_label", [True, False])
def test_blocks_of_classes_or_samples_end_at_the_same_fit(
    monkeypatch: pytest.MonkeyPatch, multi_label: bool
) -> None:
    x = random(120, 6)
    noise = x @ random(6, 5, seed=1) + random(120, 5, seed=2)
    y = noise > 0.5 if multi_label else torch.eye(5)[noise.argmax(dim=1)].bool()
    whole = probabilities(fit(x, y, strength=0.1, multi_label=multi_label), x)
    monkeypatch.setattr(classification, "BLOCK", 2 * 120)
    monkeypatch.setattr(logistic, "HISTORY", 0)
    found = fit(x, y, strength=0.1, multi_label=multi_label).scores(x)
    parts = [torch.from_numpy(found(slice(k, k + 2))) for k in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-3, rtol=0)
