from __future__ import annotations

import math

import pytest

from vilmedic.executors.score import improves, lower_is_better


@pytest.mark.parametrize("metric", ["validation_loss", "validation_retrieval_i2t_median_rank"])
def test_losses_and_ranks_get_better_downwards(metric: str) -> None:
    assert lower_is_better(metric)
    assert improves(1.0, 2.0, metric)
    assert not improves(2.0, 2.0, metric)
    assert not improves(10.0, 9.0, metric)


def test_everything_else_gets_better_upwards() -> None:
    assert not lower_is_better("validation_zero_shot_auroc")
    assert improves(0.9, 0.8, "validation_zero_shot_auroc")


def test_not_a_number_never_improves() -> None:
    assert not improves(math.nan, None, "validation_loss")
    assert not improves(math.nan, 1.0, "validation_loss")
    assert improves(1.0, None, "validation_loss")


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
def test_only_finite_scores_improve(score: float) -> None:
    assert not improves(score, None, "validation_loss")
    assert not improves(score, 0.5, "validation_auroc")
