from __future__ import annotations

import random
from collections import Counter

import pytest

from vilmedic.errors import DataError
from vilmedic.preparation.splitting import (
    label_shares,
    parse_shares,
    random_split,
    stratified_split,
    unevenness,
)

SHARES = (0.8, 0.1, 0.1)


def people(number: int, seed: int = 0) -> tuple[dict[str, Counter[str]], dict[str, int]]:
    """Patients with one to nine samples, and labels of very different frequencies."""
    draw = random.Random(seed)
    frequency = {"common": 0.6, "usual": 0.2, "rare": 0.03, "very rare": 0.01}
    labels, sizes = {}, {}
    for index in range(number):
        sizes[f"p{index}"] = draw.randint(1, 9)
        labels[f"p{index}"] = Counter(
            name
            for name, share in frequency.items()
            for _ in range(sizes[f"p{index}"])
            if draw.random() < share
        )
    return labels, sizes


def test_a_random_split_is_by_patient_and_near_its_fractions() -> None:
    _, sizes = people(2000)
    split = random_split(sizes, SHARES, seed=0)
    assert set(split) == set(sizes)
    total = sum(sizes.values())
    for name, share in zip(("train", "validate", "test"), SHARES, strict=True):
        got = sum(size for group, size in sizes.items() if split[group] == name)
        assert got / total == pytest.approx(share, abs=9 / total)


def test_a_random_split_depends_on_the_seed_and_not_on_the_order() -> None:
    _, sizes = people(300)
    split = random_split(sizes, SHARES, seed=0)
    assert random_split(dict(reversed(sizes.items())), SHARES, seed=0) == split
    other = random_split(sizes, SHARES, seed=1)
    assert sum(other[group] != split[group] for group in sizes) > 30


def test_a_stratified_split_has_more_even_labels_than_a_random_one() -> None:
    labels, sizes = people(600)
    counts = {}
    for name, split in (
        ("random", random_split(sizes, SHARES, seed=0)),
        ("stratified", stratified_split(labels, sizes, SHARES, seed=0)),
    ):
        rows = {s: Counter[str]() for s in ("train", "validate", "test")}
        total = Counter[str]()
        for group, chosen in split.items():
            rows[chosen].update(labels[group])
            total[chosen] += sizes[group]
        shares = {s: {n: rows[s][n] / total[s] for n in ("rare", "very rare")} for s in rows}
        counts[name] = unevenness(shares)
        assert total["train"] / sum(total.values()) == pytest.approx(0.8, abs=0.01)
    assert counts["stratified"] < 0.003 < counts["random"]
    again = stratified_split(labels, dict(reversed(sizes.items())), SHARES, seed=0)
    assert again == stratified_split(labels, sizes, SHARES, seed=0)


def test_rare_labels_are_distributed_over_the_splits() -> None:
    labels = {f"p{i}": Counter({"rare": 1} if i < 4 else {"other": 1}) for i in range(40)}
    split = stratified_split(labels, dict.fromkeys(labels, 1), (0.5, 0.25, 0.25), seed=0)
    assert Counter(split[f"p{i}"] for i in range(4)) == {"train": 2, "validate": 1, "test": 1}
    assert Counter(split.values()) == {"train": 20, "validate": 10, "test": 10}


def test_a_split_with_fraction_zero_is_empty() -> None:
    labels, sizes = people(50)
    for split in (
        random_split(sizes, (0.9, 0.1, 0.0), seed=0),
        stratified_split(labels, sizes, (0.9, 0.1, 0.0), seed=0),
    ):
        assert set(split.values()) == {"train", "validate"}


def test_too_few_patients_are_an_error() -> None:
    with pytest.raises(DataError, match=r"No patient is left for the split 'validate'"):
        random_split({"a": 1, "b": 1}, SHARES, seed=0)


@pytest.mark.parametrize("text", ["0.8,0.2", "a,b,c", "0.8,0.3,-0.1", "0.8,0.1,0.2", ""])
def test_bad_fractions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"three shares|add up to"):
        parse_shares(text)
    assert parse_shares("0.8,0.1,0.1") == SHARES


def test_label_fractions() -> None:
    shares = label_shares({"train": [["a"], ["a", "b"]], "test": [["b"]]})
    assert shares == {"train": {"a": 1.0, "b": 0.5}, "test": {"a": 0.0, "b": 1.0}}
    assert unevenness(shares) == 1.0
