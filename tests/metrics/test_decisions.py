from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score

from tests.made_up_evaluations import evaluation, split_features
from vilmedic.errors import ConfigError
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.metrics.decisions import Classification, best_threshold

NAMES = ("Edema", "Mass")


def made(
    split: str, size: int = 60, seed: int = 0, unknown: list[tuple[int, int]] | None = None
) -> Any:
    random = torch.Generator().manual_seed(seed)
    labels = torch.rand(size, 2, generator=random) < torch.tensor([0.5, 0.2])
    logits = torch.randn(size, 2, generator=random) + 1.5 * labels - 1
    features = split_features({"logits": logits}, labels, names=NAMES, split=split)
    if unknown:
        mask = np.zeros((size, 2), np.bool_)
        mask[tuple(zip(*unknown, strict=True))] = True
        features.labels = csr_array(features.labels.toarray() & ~mask)
        features.unknown = csr_array(mask)
    return features


def both(**keys: Any) -> Evaluation:
    return evaluation(made("test", **keys), made("validate", seed=1))


def arrays(features: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    return features.features["logits"].double().sigmoid().numpy(), features.labels.toarray()


def slow_best(scores: NDArray[Any], targets: NDArray[Any], by: Any) -> float:
    return max(by(targets, scores >= cut) for cut in scores)


@pytest.mark.parametrize(("by", "metric"), [("f1", f1_score), ("mcc", matthews_corrcoef)])
def test_numbers_agree_with_scikit_learn_at_the_validation_threshold(by: str, metric: Any):
    given = both()
    report = Classification(threshold_by=by, bootstrap=0)(given)
    scores, targets = arrays(given.features)
    known, held = arrays(given.other("validate"))
    for k, name in enumerate(NAMES):
        entry = report["classes"][name]
        best = metric(held[:, k], known[:, k] >= entry["threshold"])
        assert best == pytest.approx(slow_best(known[:, k], held[:, k], metric))
        chosen = scores[:, k] >= entry["threshold"]
        assert entry["f1"] == pytest.approx(f1_score(targets[:, k], chosen))
        assert entry["mcc"] == pytest.approx(matthews_corrcoef(targets[:, k], chosen))
        assert entry["auroc"] == pytest.approx(roc_auc_score(targets[:, k], scores[:, k]))
        precision = average_precision_score(targets[:, k], scores[:, k])
        assert entry["average_precision"] == pytest.approx(precision)
    for number in ("auroc", "f1", "mcc", "calibration_error"):
        every = [entry[number] for entry in report["classes"].values()]
        assert report[number] == pytest.approx(sum(every) / 2)


def test_the_calibration_error_is_the_mean_distance_in_bins() -> None:
    given = both()
    report = Classification(bins=5, bootstrap=0)(given)
    scores, targets = arrays(given.features)
    for k, name in enumerate(NAMES):
        expected = 0.0
        for low in (0.0, 0.2, 0.4, 0.6, 0.8):
            rows = [i for i in range(60) if low <= scores[i, k] < low + 0.2]
            if rows:
                gap = scores[rows, k].mean() - targets[rows, k].mean()
                expected += len(rows) / 60 * abs(gap)
        assert report["classes"][name]["calibration_error"] == pytest.approx(expected)


def test_unknown_labels_are_excluded_per_class() -> None:
    unknown = [(i, 1) for i in range(20)]
    given = both(unknown=unknown)
    report = Classification(bootstrap=20)(given)
    scores, targets = arrays(given.features)
    entry = report["classes"]["Mass"]
    assert entry["positives"] + entry["negatives"] == 40
    rest, right = scores[20:, 1], targets[20:, 1]
    chosen = rest >= entry["threshold"]
    assert entry["auroc"] == pytest.approx(roc_auc_score(right, rest))
    assert entry["f1"] == pytest.approx(f1_score(right, chosen))
    assert entry["mcc"] == pytest.approx(matthews_corrcoef(right, chosen))
    assert entry["accuracy"] == pytest.approx(((rest > 0.5) == right).mean())
    # Scores of unknown labels do not matter.
    given.features.features["logits"][:20, 1] = 50.0
    again = Classification(bootstrap=20)(given)
    assert again["classes"]["Mass"] == entry
    assert report["classes"]["Edema"]["positives"] == int(targets[:, 0].sum())


def test_intervals_contain_the_number_and_narrow_with_samples() -> None:
    widths = []
    for size in (60, 600):
        report = Classification(bootstrap=200)(both(size=size))
        for name in ("auroc", "average_precision", "f1", "mcc"):
            low, high = report[f"{name}_interval"]
            assert low < report[name] < high
        widths.append(np.diff(report["mcc_interval"])[0])
    assert widths[1] < widths[0] / 2


def test_a_class_without_positives_has_no_numbers() -> None:
    given = both()
    given.features.labels = csr_array(given.features.labels.toarray() & np.array([True, False]))
    report = Classification(bootstrap=10)(given)
    assert report["excluded"] == ["Mass"]
    assert report["classes"]["Mass"]["f1"] is report["classes"]["Mass"]["mcc"] is None
    assert report["f1"] == report["classes"]["Edema"]["f1"]


def test_exclusive_classes_use_softmax_probabilities() -> None:
    random = torch.Generator().manual_seed(3)
    one = torch.arange(30) % 3
    logits = torch.randn(30, 3, generator=random) + 2 * torch.eye(3)[one]
    splits = [
        split_features(
            {"logits": logits}, torch.eye(3)[one], names="abc", split=split, multi_label=False
        )
        for split in ("test", "validate")
    ]
    report = Classification(bootstrap=0)(evaluation(*splits))
    assert report["accuracy"] == pytest.approx((logits.argmax(1) == one).double().mean().item())
    share = logits.double().softmax(dim=1)[:, 1].numpy()
    assert report["classes"]["b"]["auroc"] == pytest.approx(roc_auc_score(one == 1, share))


def test_the_highest_of_equally_good_thresholds_is_chosen() -> None:
    scores = np.array([0.9, 0.8, 0.3, 0.1])
    assert best_threshold(scores, np.array([1, 0, 1, 0], bool), "mcc") == pytest.approx(0.85)
    assert best_threshold(scores, np.array([0, 1, 0, 1], bool), "f1") == pytest.approx(0.1)
    assert math.isnan(best_threshold(scores, np.zeros(4, bool), "f1"))


def test_sample_scores_are_recorded() -> None:
    given = both(unknown=[(3, 0)])
    given.recorded = {}
    report = Classification(bootstrap=0)(given)
    assert set(given.recorded) == {"scores", "classes", "thresholds"}
    scores, _targets = arrays(given.features)
    np.testing.assert_allclose(given.recorded["scores"], scores, rtol=1e-12)
    cuts = [entry["threshold"] for entry in report["classes"].values()]
    assert given.recorded["thresholds"].tolist() == cuts
    samples = given.samples()
    assert samples["labels"][3, 0] == -1
    assert samples["lines"].tolist() == list(range(1, 61))
    assert samples["images"][1] == "1.png,b.png"


def test_models_without_logits_are_refused_and_baselines_are_null() -> None:
    given = evaluation(split_features({"visual": torch.zeros(4, 2)}, torch.eye(4)[:, :2]))
    with pytest.raises(ConfigError, match=r"^the model gives no feature 'logits'"):
        Classification().check(given)
    assert Classification()(given)["f1"] is None
