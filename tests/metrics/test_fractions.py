from __future__ import annotations

import itertools

from vilmedic.metrics.fractions import nested_subsets, read_fractions


def test_smaller_shares_lie_within_larger_ones() -> None:
    subsets = nested_subsets(200, [0.001, 0.1, 1.0], seed=4)
    assert [len(rows) for rows in subsets] == [2, 20, 200]
    for small, large in itertools.pairwise(subsets):
        assert large[: len(small)].tolist() == small.tolist()
    assert sorted(subsets[-1].tolist()) == list(range(200))
    assert nested_subsets(200, [0.1], seed=4)[0].tolist() == subsets[1].tolist()
    assert nested_subsets(200, [0.1], seed=5)[0].tolist() != subsets[1].tolist()


def test_shares_are_sorted() -> None:
    assert read_fractions(None) == [1.0]
    assert read_fractions([1.0, 0.01, 0.1, 0.01]) == [0.01, 0.1, 1.0]
