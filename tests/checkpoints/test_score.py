from __future__ import annotations

import math

import pytest

from vilmedic.checkpoints.score import improves


def test_a_score_improves_in_its_direction() -> None:
    assert improves(1.0, 2.0, "lower")
    assert not improves(2.0, 2.0, "lower")
    assert not improves(10.0, 9.0, "lower")
    assert improves(0.9, 0.8, "higher")
    assert not improves(0.8, 0.8, "higher")
    assert improves(1.0, None, "lower")


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_only_finite_scores_improve(score: float, better: str) -> None:
    assert not improves(score, None, better)
    assert not improves(score, 0.5, better)
