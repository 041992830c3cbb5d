from __future__ import annotations

import time

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from tests.evaluations import evaluation, random, split_features
from vilmedic.errors import ConfigError
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.metrics.linear_probe import LinearProbe

NAMES = ("A", "B", "C")


def make(
    size: int, seed: int, split: str, *, multi_label: bool = True, noise: float = 1.0
) -> SplitFeatures:
    """Features that hold the labels, in directions of very different scale."""
    x = random(size, 12, seed=seed)
    logits = x @ random(12, 3, seed=99) + noise * random(size, 3, seed=seed + 1)
    hard = torch.nn.functional.one_hot(logits.argmax(dim=1), 3)
    labels = (logits > 1).float() if multi_label else hard.float()
    scale = torch.logspace(-3, 3, 12)
    features = {"visual_backbone": x * scale + 5 * scale, "noise": random(size, 12, seed=seed + 2)}
    return split_features(features, labels, names=NAMES, split=split, multi_label=multi_label)


@pytest.mark.parametrize("multi_label", [True, False])
def test_reads_labels_off_features_and_nothing_off_noise(multi_label: bool) -> None:
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


def test_numbers_are_those_of_scikit_learn() -> None:
    test, train = make(200, 0, "test"), make(400, 10, "train")
    result = LinearProbe(bootstrap=10)(evaluation(test, train))
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert test.labels is not None
    assert train.labels is not None
    for column, name in enumerate(NAMES):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=result["fit"]["C"]))
        model.fit(train.features["visual_backbone"].numpy(), train.labels[:, column].numpy())
        scores = model.predict_proba(test.features["visual_backbone"].numpy())[:, 1]
        area = roc_auc_score(test.labels[:, column].numpy(), scores)
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


def test_a_class_that_the_training_labels_lack_is_left_out() -> None:
    train = make(100, 10, "train")
    assert train.labels is not None
    train.labels[:, 1] = 0
    result = LinearProbe(bootstrap=10)(evaluation(make(100, 0, "test"), train))
    assert result["excluded"] == ["B"]
    assert result["classes"]["B"]["auroc"] is None
    assert result["auroc"] is not None


def test_constant_and_few_samples_do_not_break_it() -> None:
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
