from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.made_up_evaluations import evaluation, random, split_features
from vilmedic.errors import ConfigError
from vilmedic.metrics.representation import Representation, effective_rank, spread, uniformity


def test_uniformity_agrees_with_pairs() -> None:
    unit = torch.nn.functional.normalize(random(40, 5).double(), dim=1)
    pairs = [
        math.exp(-2 * (a - b).square().sum().item()) for a, b in itertools.permutations(unit, 2)
    ]
    expected = math.log(sum(pairs) / len(pairs))
    assert uniformity(unit, block=7) == pytest.approx(expected, abs=1e-12)


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.cat([torch.eye(6), -torch.eye(6)]).double()) == pytest.approx(6)
    line = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]], dtype=torch.float64)
    assert effective_rank(line) == pytest.approx(1)
    assert effective_rank(torch.ones(5, 3, dtype=torch.float64)) == 0.0


def test_collapse_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    good, flat = random(50, 8), torch.ones(50, 8) + 1e-6 * random(50, 1)
    result = Representation()(evaluation(split_features({"visual": good, "linguistic": flat})))
    assert "'linguistic' has collapsed" in caplog.text
    assert "'visual'" not in caplog.text
    assert result["visual_effective_rank"] > 7
    assert result["linguistic_effective_rank"] < 2
    assert result["visual_uniformity"] < result["linguistic_uniformity"]


def test_features_that_differ_only_by_noise_have_collapsed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    noise = torch.ones(50, 8) + 1e-3 * random(50, 8)
    result = Representation()(evaluation(split_features({"visual": noise})))
    assert result["visual_effective_rank"] > 6
    assert result["visual_spread"] < 1e-5
    assert "'visual' has collapsed: effective rank" in caplog.text
    assert spread(torch.eye(4).double()) == pytest.approx(0.75)


def test_alignment_of_two_views() -> None:
    x, y = random(20, 4), random(20, 4, seed=1)
    result = Representation()(evaluation(split_features({"visual": x, "visual_second": y})))
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double())
    assert result["alignment"] == pytest.approx((2 - 2 * cosine).mean().item())
    assert not any(name.startswith("visual_second") for name in result)


def test_alignment_is_zero_for_equal_pairs_and_null_without() -> None:
    x = random(20, 4)
    metric = Representation(max_samples=10)
    pair = split_features({"visual": x, "linguistic": 2 * x})
    assert metric(evaluation(pair))["alignment"] == pytest.approx(0, abs=1e-12)
    assert metric(evaluation(split_features({"visual": x})))["alignment"] is None
    with pytest.raises(ConfigError, match="Did you mean 'visual'"):
        Representation(features=["visul"]).check(evaluation(pair))
