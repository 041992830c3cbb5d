"""Splits by patient: random, or stratified by label."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vilmedic.errors import DataError

SPLITS = ("train", "validate", "test")
# Names of splits as tables have them.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validate": "validate",
    "validation": "validate",
    "valid": "validate",
    "val": "validate",
    "dev": "validate",
    "test": "test",
    "testing": "test",
}
Shares = tuple[float, float, float]
CANDIDATES = 64  # patients that one is offered in exchange


def parse_shares(text: str) -> Shares:
    """Shares of training, validation and test data out of a text such as `0.8,0.1,0.1`.

    Raises:
        ValueError: not three numbers of 0 or more that add up to 1.
    """
    parts = text.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(f"'{text}' is not three shares of train,validate,test such as 0.8,0.1,0.1")
    if not math.isclose(sum(numbers), 1, abs_tol=1e-6):
        raise ValueError(f"the shares {text} add up to {sum(numbers):g} instead of 1")
    return (numbers[0], numbers[1], numbers[2])


def group_key(name: str) -> str:
    """Common key of the names of one group: `1` and `1.0` are one patient, read by two programs."""
    return plain_number(" ".join(unicodedata.normalize("NFC", name).split()))


def plain_number(text: str) -> str:
    """An id as it was before a program took it for a floating-point number: `12.0` is `12`."""
    whole, point, rest = text.partition(".")
    return whole if point and whole.lstrip("-").isdecimal() and not rest.strip("0") else text


def random_split(sizes: Mapping[str, int], shares: Shares, seed: int) -> dict[str, str]:
    """Give each patient a split at random, so that the splits get their shares of the samples.

    The result depends on the patients, their sizes and the seed alone, on any machine.

    Args:
        sizes: number of samples of each patient.
        shares: of the samples, for `train`, `validate` and `test`.
        seed: of the order in which patients are dealt out.

    Raises:
        DataError: there are too few patients for a split to get one.
    """
    total = sum(sizes.values())
    limits = np.cumsum(shares) * total
    chosen: dict[str, str] = {}
    before = 0
    for group in sorted(sizes, key=lambda name: _rank(name, seed)):
        middle = before + sizes[group] / 2
        position = min(int(np.searchsorted(limits, middle, side="right")), 2)
        chosen[group] = SPLITS[position]
        before += sizes[group]
    _check_filled(chosen, shares)
    return chosen


def stratified_split(
    labels: Mapping[str, Mapping[str, int]],
    sizes: Mapping[str, int],
    shares: Shares,
    seed: int,
) -> dict[str, str]:
    """Give each patient a split so that every label is spread evenly over the splits.

    Iterative stratification (Sechidis et al. 2011), with patients in place of samples: the label
    with the fewest samples left is dealt out first, each of its patients to the split that still
    lacks most of that label, then most samples, then at random. As patients bring several labels,
    what was dealt out last is uneven still; patients are then moved and exchanged as long as that
    lowers Pearson's chi-square of labels by splits.

    Args:
        labels: of each patient, the number of samples with each label.
        sizes: number of samples of each patient.
        shares: see `random_split`.
        seed: of what is left to chance.

    Raises:
        DataError: there are too few patients for a split to get one.
    """
    names = sorted({name for counts in labels.values() for name in counts})
    column = {name: number for number, name in enumerate(names)}
    groups = sorted(sizes, key=lambda name: _rank(name, seed))
    counts = np.zeros((len(groups), len(names)), np.int64)
    for row, group in enumerate(groups):
        for name, count in labels.get(group, {}).items():
            counts[row, column[name]] = count
    size = np.array([sizes[group] for group in groups], np.int64)
    share = np.array(shares)
    wanted = share[:, None] * counts.sum(axis=0)
    capacity = share * size.sum()
    usable = share > 0
    split = np.full(len(groups), -1)

    def deal(row: int, key: np.ndarray) -> None:
        best = np.flatnonzero(usable & np.isclose(key, key[usable].max()))
        place = int(best[np.argmax(capacity[best])])
        split[row] = place
        wanted[place] -= counts[row]
        capacity[place] -= size[row]

    left = counts.sum(axis=0).astype(float)
    while names and (left > 0).any():
        rarest = int(np.argmin(np.where(left > 0, left, np.inf)))
        rows = np.flatnonzero((split < 0) & (counts[:, rarest] > 0))
        # Patients with many such samples first: the small ones even out what is left.
        for row in rows[np.argsort(-counts[rows, rarest], kind="stable")].tolist():
            deal(row, wanted[:, rarest])
            left -= counts[row]
        left[rarest] = 0
    for row in np.flatnonzero(split < 0).tolist():
        deal(row, capacity)
    _refine(split, np.column_stack([counts, size]), share, seed)
    chosen = {group: SPLITS[split[row]] for row, group in enumerate(groups)}
    _check_filled(chosen, shares)
    return chosen


def _refine(
    split: np.ndarray, counts: np.ndarray, share: np.ndarray, seed: int, passes: int = 10
) -> None:
    """Move patients between splits, in place, while that makes the splits more alike.

    Each patient in turn is offered a place in every other split, and an exchange with each of some
    patients drawn at random; the best of these is taken when it is better than staying.

    Args:
        split: number of the split of each patient [P].
        counts: samples of each patient with each label, and, last, all of its samples [P, L + 1].
        share: of each split [S].
        seed: of the drawing.
        passes: over all patients, at most.
    """
    draw = np.random.default_rng(seed)
    target = share[:, None] * counts.sum(axis=0)
    weight = 1 / np.maximum(target, 1e-9)
    weight[:, -1] *= counts.shape[1]  # the size of a split matters as much as all its labels
    excess = -target
    np.add.at(excess, split, counts)
    places = np.flatnonzero(share > 0)
    counts = np.vstack([counts, np.zeros_like(counts[: len(places)])])  # "nobody" of each split
    split_of = np.concatenate([split, places])
    nobody = np.arange(len(split), len(split_of))
    for _ in range(passes):
        moved = False
        for row in range(len(split)):
            here = split_of[row]
            others = np.concatenate([nobody, draw.integers(len(split), size=CANDIDATES)])
            there = split_of[others]
            net = counts[row] - counts[others]
            change = ((net - 2 * excess[here]) * net * weight[here]).sum(axis=1)
            change += ((net + 2 * excess[there]) * net * weight[there]).sum(axis=1)
            change[there == here] = np.inf
            best = int(np.argmin(change))
            if change[best] < -1e-9:
                excess[here] -= net[best]
                excess[there[best]] += net[best]
                split_of[row] = there[best]
                if others[best] < len(split):
                    split_of[others[best]] = here
                moved = True
        if not moved:
            break
    split[:] = split_of[: len(split)]


def label_shares(rows: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, dict[str, float]]:
    """Of each split, the share of its samples that have each label.

    Args:
        rows: of each split, the labels of its samples.
    """
    names = sorted({name for split in rows.values() for row in split for name in row})
    shares = {}
    for split, samples in rows.items():
        seen = Counter(name for row in samples for name in set(row))
        shares[split] = {name: seen[name] / max(1, len(samples)) for name in names}
    return shares


def unevenness(shares: Mapping[str, Mapping[str, float]]) -> float:
    """The largest difference, over labels, between the shares of two splits."""
    splits = list(shares.values())
    names = splits[0] if splits else {}
    return max(
        (max(s[name] for s in splits) - min(s[name] for s in splits) for name in names), default=0.0
    )


def _rank(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()


def _check_filled(chosen: Mapping[str, str], shares: Shares) -> None:
    found = set(chosen.values())
    for name, share in zip(SPLITS, shares, strict=True):
        if share > 0 and name not in found:
            raise DataError(
                f"No patient is left for the split '{name}': there are {len(chosen)} in all. "
                "Give it a larger share with --split, or more data."
            )
