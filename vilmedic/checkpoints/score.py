"""Scores of a model: when one improves on another."""

from __future__ import annotations

import math


def improves(score: float, best: float | None, better: str) -> bool:
    """Whether a score beats the best one so far; one that is not finite never does.

    Args:
        score: the score.
        best: the best one so far; None when there is none.
        better: `higher` or `lower`.
    """
    if not math.isfinite(score):
        return False
    if best is None:
        return True
    return score < best if better == "lower" else score > best
