"""Scores of a model: which direction is better, and when one improves on another."""

from __future__ import annotations

import math

LOWER_IS_BETTER = ("loss", "median_rank", "perplexity", "error", "alignment", "uniformity")
HIGHER_IS_BETTER = ("codebook_perplexity",)
"""Exceptions: many codes in even use are what a codebook is for."""


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good, judged by the last words of its name.

    Args:
        metric: a score's name, such as `validation_loss` or `validation_retrieval_median_rank`.
    """
    return metric.endswith(LOWER_IS_BETTER) and not metric.endswith(HIGHER_IS_BETTER)


def improves(score: float, best: float | None, metric: str) -> bool:
    """Whether a score beats the best one so far; one that is not finite never does."""
    if not math.isfinite(score):
        return False
    if best is None:
        return True
    return score < best if lower_is_better(metric) else score > best
