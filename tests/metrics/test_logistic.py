from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference

from tests.evaluations import random
from vilmedic.metrics.logistic import LogisticRegression


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_binary_tasks_agree_with_scikit_learn(strength: float) -> None:
    x = random(200, 10).double()
    y = x @ random(10, 3, seed=1).double() + random(200, 3, seed=2) > 0.5
    ours = LogisticRegression(x, y, strength=strength, multi_label=True)
    for column in range(3):
        theirs = Reference(C=strength, tol=1e-8).fit(x.numpy(), y[:, column].numpy())
        expected = torch.from_numpy(theirs.predict_proba(x.numpy())[:, 1])
        torch.testing.assert_close(
            ours(x)[:, column].double(), expected.double(), atol=1e-4, rtol=0
        )


def test_multinomial_task_agrees_with_scikit_learn() -> None:
    x = random(200, 10).double()
    target = (x @ random(10, 4, seed=1).double() + random(200, 4, seed=2)).argmax(dim=1)
    y = torch.nn.functional.one_hot(target, 4).bool()
    ours = LogisticRegression(x, y, strength=0.1, multi_label=False)
    theirs = Reference(C=0.1, tol=1e-8).fit(x.numpy(), target.numpy())
    expected = torch.from_numpy(theirs.predict_proba(x.numpy()))
    torch.testing.assert_close(ours(x).double(), expected.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("multi_label", [True, False])
def test_a_class_that_is_not_there_has_no_scores(multi_label: bool) -> None:
    x = random(20, 3)
    y = torch.zeros(20, 3, dtype=torch.bool)
    y[:10, 0] = y[10:, 2] = True
    scores = LogisticRegression(x, y, strength=0.1, multi_label=multi_label)(x)
    assert scores[:, 1].isnan().all()
    assert scores[:, [0, 2]].isfinite().all()


def test_fits_under_inference_mode() -> None:
    x = random(20, 3)
    with torch.no_grad():
        fitted = LogisticRegression(x, x[:, :1] > 0, strength=1.0, multi_label=True)
    assert ((fitted(x) > 0.5) == (x[:, :1] > 0)).float().mean() > 0.9
