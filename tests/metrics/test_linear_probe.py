from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.metrics import roc_auc_score
from torch import Tensor

from tests.made_up_evaluations import evaluation, random, sparse, split_features
from vilmedic.errors import ConfigError
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.metrics import classification, linear_probe
from vilmedic.metrics.linear_probe import (
    LinearProbe,
    LogisticRegression,
    nested_subsets,
    read_fractions,
)

NAMES = ("A", "B", "C")


def make(
    size: int, seed: int, split: str, *, multi_label: bool = True, noise: float = 1.0
) -> SplitFeatures:
    """Features that contain the labels, in directions of very different scale."""
    x = random(size, 12, seed=seed)
    logits = x @ random(12, 3, seed=99) + noise * random(size, 3, seed=seed + 1)
    hard = torch.nn.functional.one_hot(logits.argmax(dim=1), 3)
    labels = (logits > 1).float() if multi_label else hard.float()
    scale = torch.logspace(-3, 3, 12)
    features = {"visual_backbone": x * scale + 5 * scale, "noise": random(size, 12, seed=seed + 2)}
    return split_features(features, labels, names=NAMES, split=split, multi_label=multi_label)


@pytest.mark.parametrize("multi_label", [True, False])
def test_finds_labels_in_features_and_chance_in_noise(multi_label: bool) -> None:
    run = evaluation(
        make(300, 0, "test", multi_label=multi_label),
        make(600, 10, "train", multi_label=multi_label),
    )
    good = LinearProbe(bootstrap=100)(run)
    assert good["auroc"] > 0.9
    assert good["auroc_interval"][0] < good["auroc"] < good["auroc_interval"][1]
    assert good["accuracy"] > 0.75
    assert good["accuracy_interval"][0] < good["accuracy"] < good["accuracy_interval"][1]
    assert ("accuracy" in good["classes"]["A"]) == multi_label
    bad = LinearProbe(features="noise", bootstrap=100)(run)
    assert 0.4 < bad["auroc"] < 0.6
    assert LinearProbe(bootstrap=100)(run) == good


def test_numbers_agree_with_scikit_learn() -> None:
    test, train = make(200, 0, "test"), make(400, 10, "train")
    result = LinearProbe(bootstrap=10)(evaluation(test, train))
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert test.labels is not None
    assert train.labels is not None
    for column, name in enumerate(NAMES):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=result["fit"]["C"]))
        model.fit(train.features["visual_backbone"].numpy(), train.labels.toarray()[:, column])
        scores = model.predict_proba(test.features["visual_backbone"].numpy())[:, 1]
        area = roc_auc_score(test.labels.toarray()[:, column], scores)
        assert result["classes"][name]["auroc"] == pytest.approx(area, abs=2e-3)


def test_fractions_are_reported_and_the_largest_is_the_headline() -> None:
    run = evaluation(make(100, 0, "test"), make(500, 10, "train", noise=3.0))
    result = LinearProbe(fractions=[1.0, 0.02, 0.2], bootstrap=10)(run)
    fits = [part["fit"] for part in result["fractions"]]
    assert [(fit["fraction"], fit["samples"]) for fit in fits] == [
        (0.02, 10),
        (0.2, 100),
        (1.0, 500),
    ]
    areas = [part["auroc"] for part in result["fractions"]]
    assert areas[0] < areas[2]
    assert result["auroc"] == areas[2]


def test_a_class_missing_in_training_is_excluded() -> None:
    train = make(100, 10, "train")
    assert train.labels is not None
    train.labels = train.labels.multiply([1, 0, 1]).tocsr().astype(bool)
    result = LinearProbe(bootstrap=10)(evaluation(make(100, 0, "test"), train))
    assert result["excluded"] == ["B"]
    assert result["classes"]["B"]["auroc"] is None
    assert result["auroc"] is not None


def test_excluded_classes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    train = make(100, 10, "train")
    assert train.labels is not None
    train.labels = train.labels.multiply([1, 0, 1]).tocsr().astype(bool)
    run = evaluation(make(100, 0, "test"), train)
    LinearProbe(fractions=[0.5, 0.8, 1.0], bootstrap=0)(run)
    assert caplog.text.count("left out of the means") == 1


def test_constant_features_and_few_samples_work() -> None:
    train, test = make(2, 10, "train"), make(30, 0, "test")
    result = LinearProbe(bootstrap=10)(evaluation(test, train))
    assert result["fit"]["samples"] == 2
    for split in (train, test):
        split.features["visual_backbone"] = torch.ones(len(split), 12)
    train = make(50, 10, "train")
    train.features["visual_backbone"] = torch.ones(50, 12)
    result = LinearProbe(bootstrap=10)(evaluation(test, train))
    assert result["auroc"] == pytest.approx(0.5)


def test_null_without_labels_or_finite_features() -> None:
    test, train = make(30, 0, "test"), make(30, 10, "train")
    assert LinearProbe()(evaluation(split_features(test.features), train))["auroc"] is None
    train.features["visual_backbone"][3, 3] = torch.inf
    assert LinearProbe()(evaluation(test, train))["auroc"] is None
    assert LinearProbe(features="visual")(evaluation(test, train))["auroc"] is None


def test_refuses_unknown_features() -> None:
    with pytest.raises(ConfigError, match=r"visual_backbon.*Did you mean 'visual_backbone'"):
        LinearProbe(features="visual_backbon").check(evaluation(make(3, 0, "test")))


def test_a_thousand_features_take_seconds() -> None:
    def wide(size: int, seed: int, split: str) -> SplitFeatures:
        x: Tensor = random(size, 512, seed=seed)
        labels = (x[:, :5] + random(size, 5, seed=seed + 1) > 1).float()
        return split_features({"visual_backbone": x}, labels, names="abcde", split=split)

    run = evaluation(wide(500, 0, "test"), wide(4000, 2, "train"))
    started = time.perf_counter()
    result = LinearProbe()(run)
    assert result["auroc"] > 0.75
    assert time.perf_counter() - started < 30


def test_smaller_fractions_are_subsets_of_larger_ones() -> None:
    subsets = nested_subsets(200, [0.001, 0.1, 1.0], seed=4)
    assert [len(rows) for rows in subsets] == [2, 20, 200]
    for small, large in itertools.pairwise(subsets):
        assert large[: len(small)].tolist() == small.tolist()
    assert sorted(subsets[-1].tolist()) == list(range(200))
    assert nested_subsets(200, [0.1], seed=4)[0].tolist() == subsets[1].tolist()
    assert nested_subsets(200, [0.1], seed=5)[0].tolist() != subsets[1].tolist()


def test_fractions_are_sorted() -> None:
    assert read_fractions(None) == [1.0]
    assert read_fractions([1.0, 0.01, 0.1, 0.01]) == [0.01, 0.1, 1.0]


def fit(x: Tensor, y: Tensor, **options: Any) -> LogisticRegression:
    return LogisticRegression(x, sparse(y), **options)


def probabilities(model: LogisticRegression, x: Tensor) -> Tensor:
    return torch.from_numpy(model.scores(x)(slice(None)))


def objective(weight: Tensor, log_losses: Tensor, strength: float) -> float:
    """scikit-learn's objective: the sum of log losses and |W|^2 / (2 C)."""
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
def test_multi_class_task_agrees_with_scikit_learn(classes: int, strength: float) -> None:
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
def test_an_absent_class_has_no_scores(multi_label: bool) -> None:
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
def test_block_size_does_not_change_the_fit(
    monkeypatch: pytest.MonkeyPatch, multi_label: bool
) -> None:
    x = random(120, 6)
    noise = x @ random(6, 5, seed=1) + random(120, 5, seed=2)
    y = noise > 0.5 if multi_label else torch.eye(5)[noise.argmax(dim=1)].bool()
    whole = probabilities(fit(x, y, strength=0.1, multi_label=multi_label), x)
    monkeypatch.setattr(classification, "BLOCK", 2 * 120)
    monkeypatch.setattr(linear_probe, "HISTORY", 0)
    found = fit(x, y, strength=0.1, multi_label=multi_label).scores(x)
    parts = [torch.from_numpy(found(slice(k, k + 2))) for k in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-3, rtol=0)
