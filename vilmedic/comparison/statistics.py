"""Statistics over runs: means, intervals over samples and seeds, paired differences.

A number of a run varies for two reasons: other samples could have been in the split, and another
seed could have been trained with. The first is measured by a bootstrap over the samples, with the
same resamples for all runs, so that what makes a sample hard for all of them cancels in a
difference (Efron and Tibshirani 1993, chapters 6 and 8). The second is measured by the variance
between the seeds, with the t distribution that so few values ask for. The half widths of both are
added in quadrature (the MOVER of Zou and Donner 2008), so that two or three seeds that disagree
give appropriately wide intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]

CONFIDENCE = 0.95
LEVEL = 0.05
"""Accepted rate of false differences over all comparisons of a column together."""
NO_DIFFERENCE = 1e-12  # values closer than this are equal
LARGE = 1e9  # degrees of freedom
SMALLEST = 1e-16  # p value that is shown as a number


@dataclass(frozen=True)
class Estimate:
    """Estimate of a metric for a setting.

    Args:
        value: the mean over the seeds.
        spread: the standard deviation between the seeds; None with one.
        seeds: how many there are.
        interval: 95% interval over samples, seeds or both; None if neither is known.
        over: the sources of the interval: `samples`, `seeds`, `samples and seeds` or empty.
        draws: the mean over the seeds in each resample of the samples, [R]; None if unknown.
        seed_variance: the variance of `value` due to the seeds.
    """

    value: float
    spread: float | None
    seeds: int
    interval: tuple[float, float] | None
    over: str
    draws: Array | None
    seed_variance: float


@dataclass(frozen=True)
class Difference:
    """Difference between a setting and the best one.

    Args:
        value: its mean minus that of the best.
        interval: 95% interval of this comparison alone.
        p: p value: probability of a difference at least as large between equal settings.
        corrected: p after Holm's correction.
    """

    value: float
    interval: tuple[float, float]
    p: float
    corrected: float

    @property
    def significant(self) -> bool:
        """Whether it is significant, over all comparisons of the column together."""
        return self.corrected < LEVEL


def estimate(
    values: Sequence[float],
    draws: Sequence[Array | None],
    known: tuple[float, float] | None = None,
) -> Estimate:
    """Estimate a metric of a setting from its seeds.

    Args:
        values: the number of each seed, [S].
        draws: the number of each seed in the same resamples of the samples, [R] each; None
            without predictions. Resamples in which it is undefined (nan), such as ones without a
            positive, are left out; if most are, all are.
        known: the interval in the evaluation of a single seed, used without draws.
    """
    seeds = len(values)
    value = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if seeds > 1 else None
    whole = [one for one in draws if one is not None and np.isfinite(one).mean() > 0.5]
    mean = np.mean(whole, axis=0) if len(whole) == seeds and whole[0].size > 1 else None
    paired = whole if mean is not None else []
    seed_variance = 0.0 if spread is None else _seed_variance(spread, seeds, paired)
    if seeds == 1:
        if mean is not None:
            low, high = np.nanquantile(mean, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
            known = (float(low), float(high))
        return Estimate(value, None, 1, known, "samples" if known else "", mean, 0.0)
    half = _half_width([_sample_part(mean), (seed_variance, seeds - 1)])
    over = "seeds" if mean is None else "samples and seeds"
    return Estimate(value, spread, seeds, (value - half, value + half), over, mean, seed_variance)


def difference(one: Estimate, best: Estimate, comparisons: int = 1) -> Difference | None:
    """Return the difference of a setting to the best one, on the same samples.

    Args:
        one: the setting.
        best: the best one.
        comparisons: for `corrected`, which multiplies by it; see `holm` for several.

    Returns:
        None without predictions if one of them has a single seed.
    """
    gap = one.value - best.value
    parts = [(each.seed_variance, float(each.seeds - 1)) for each in (one, best) if each.seeds > 1]
    if one.draws is not None and best.draws is not None and len(one.draws) == len(best.draws):
        parts.append(_sample_part(one.draws - best.draws))
    elif min(one.seeds, best.seeds) < 2:
        return None
    half, p = _half_width(parts), _chance(abs(gap), parts)
    return Difference(gap, (gap - half, gap + half), p, min(1.0, p * comparisons))


def holm(p_values: Sequence[float], comparisons: int | None = None) -> list[float]:
    """Holm's correction (1979): bounds the probability of any false difference.

    Args:
        p_values: of the comparisons that are reported.
        comparisons: how many were possible, when the best of several was chosen by the same data:
            any of the pairs could have been reported. None takes the number of p values.

    Returns:
        The corrected values, in the same order.
    """
    count = len(p_values) if comparisons is None else comparisons
    if count < len(p_values):
        raise ValueError(f"{len(p_values)} p values of {count} comparisons")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def differences(estimates: Sequence[Estimate], best: int) -> list[Difference | None]:
    """Return the differences of all settings of a column to the best one, corrected together.

    The best one was chosen by the same numbers, so every pair of settings counts as a comparison.

    Args:
        estimates: of the settings.
        best: which of them is the best.

    Returns:
        One per setting; None for the best and for settings that cannot be compared.
    """
    found = [
        None if place == best else difference(one, estimates[best])
        for place, one in enumerate(estimates)
    ]
    compared = [place for place, one in enumerate(found) if one is not None]
    pairs = (len(compared) + 1) * len(compared) // 2
    corrected = holm([one.p for one in found if one is not None], pairs)
    for place, p in zip(compared, corrected, strict=True):
        one = found[place]
        assert one is not None
        found[place] = Difference(one.value, one.interval, one.p, p)
    return found


def _seed_variance(spread: float, seeds: int, draws: Sequence[Array]) -> float:
    """Return the part of a mean's variance that is due to the seeds.

    Part of the variance between seeds comes from the samples, to which each seed responds
    differently. The bootstrap already includes that part, so it is subtracted.

    Args:
        spread: standard deviation between the seeds.
        seeds: how many there are.
        draws: of the seeds, in the same resamples; none when unknown.
    """
    if not draws:
        return spread**2 / seeds
    own = np.asarray(draws) - np.mean(draws, axis=0)
    of_samples = float(np.mean(np.nanvar(own, axis=1, ddof=1))) * seeds / (seeds - 1)
    return max(0.0, spread**2 - of_samples) / seeds


def _sample_part(draws: Array | None) -> tuple[float, float]:
    """The variance over the samples, and its degrees of freedom."""
    return (0.0, LARGE) if draws is None else (float(np.nanvar(draws, ddof=1)), LARGE)


def _half_width(parts: Sequence[tuple[float, float]], chance: float = 1 - CONFIDENCE) -> float:
    """Half the width of an interval for a sum of independent parts.

    Args:
        parts: variance and degrees of freedom of each.
        chance: probability outside the interval.
    """
    parts = [(variance, freedom) for variance, freedom in parts if variance > 0]
    if not parts:
        return 0.0
    variances, freedoms = np.array(parts).T
    # for infinite degrees of freedom t is the normal distribution, as for a large number
    quantiles = stdtrit(np.minimum(freedoms, LARGE), 1 - chance / 2)
    return float(np.sqrt((quantiles**2 * variances).sum()))


def _chance(gap: float, parts: Sequence[tuple[float, float]]) -> float:
    """Return the p value of a difference: where its interval ends at zero."""
    if _half_width(parts) <= NO_DIFFERENCE:
        return 1.0 if gap <= NO_DIFFERENCE else 0.0
    low, high = np.log(SMALLEST), 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _half_width(parts, np.exp(middle)) > gap else (low, middle)
    return float(np.exp(high)) if high < 0 else 1.0
