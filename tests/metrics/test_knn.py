from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.made_up_evaluations import evaluation, random, sparse, split_features
from vilmedic.metrics import knn
from vilmedic.metrics.knn import NearestNeighbours, Neighbours


def vote(queries: Tensor, voters: Tensor, votes: Tensor, **options: Any) -> Tensor:
    """The vote shares of all classes."""
    scores = Neighbours(queries, voters, **options).scores(sparse(votes))
    return torch.from_numpy(scores(slice(None)))


@pytest.mark.parametrize("block", [1 << 24, 40])
def test_votes_agree_with_a_slow_reference(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(knn, "BLOCK", block)
    queries, voters = random(9, 5), random(20, 5, seed=1)
    votes = (random(20, 3, seed=2) > 0).float()
    shares = vote(queries, voters, votes, k=4, temperature=0.1)
    for query, share in zip(queries, shares, strict=True):
        similarity = functional.cosine_similarity(query[None], voters)
        nearest = sorted(range(20), key=lambda j: -similarity[j].item())[:4]
        weights = [math.exp(similarity[j].item() / 0.1) for j in nearest]
        for column in range(3):
            expected = sum(
                w * votes[j, column].item() for w, j in zip(weights, nearest, strict=True)
            )
            assert share[column].item() == pytest.approx(expected / sum(weights), abs=1e-5)


def test_two_exclusive_classes_have_equal_auroc() -> None:
    """Unanimous votes are ties for all similarities: both classes have the same AUROC."""

    def balanced(size: int, seed: int, split: str):  # type: ignore[no-untyped-def]
        target = torch.arange(size) % 2
        x = random(size, 8, seed=seed) + 1.2 * target[:, None] * random(1, 8, seed=7)
        labels = functional.one_hot(target, 2).float()
        return split_features(
            {"visual_backbone": x}, labels, names="ab", split=split, multi_label=False
        )

    run = evaluation(balanced(400, 1, "test"), balanced(600, 2, "train"))
    result = NearestNeighbours(bootstrap=0)(run)
    areas = [entry["auroc"] for entry in result["classes"].values()]
    assert 0.7 < areas[0] < 0.99
    assert areas[0] == pytest.approx(areas[1], abs=1e-12)


def test_voters_tied_with_the_last_neighbour_share_its_vote() -> None:
    """Four voters tie for the last places among the neighbours and share them."""
    query = torch.tensor([[1.0, 0.0]])
    near, far = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    voters = torch.cat([far * 2, near, far, 3 * far, far * 0.1])
    votes = functional.one_hot(torch.tensor([1, 0, 1, 2, 2]), 3).float()
    weights = [math.exp(value / 0.1) for value in (3 / math.sqrt(10), math.sqrt(0.5))]
    shares = vote(query, voters, votes, k=2, temperature=0.1)
    total = weights[0] + weights[1]
    expected = [weights[0] / total, weights[1] / 2 / total, weights[1] / 2 / total]
    assert shares[0].tolist() == pytest.approx(expected)
    order = torch.tensor([3, 4, 0, 1, 2])
    turned = vote(query, voters[order], votes[order], k=2, temperature=0.1)
    assert turned[0].tolist() == pytest.approx(expected)


def test_a_sample_does_not_vote_for_itself() -> None:
    x, votes = random(6, 4), torch.eye(6)
    shares = vote(x, x, votes, k=10, temperature=0.07, own=torch.arange(6))
    assert shares.diagonal().abs().max() == 0
    assert shares.sum(dim=1).tolist() == pytest.approx([1.0] * 6)
    rows = torch.tensor([4, 1, 5])  # a subset of the split in any order
    part = vote(x, x[rows], votes[rows], k=10, temperature=0.07, own=rows)
    assert part.diagonal().abs().max() == 0
    assert part.sum(dim=1).tolist() == pytest.approx([1.0] * 6)
    assert part[:, [0, 2, 3]].abs().max() == 0


@pytest.mark.parametrize("multi_label", [True, False])
def test_finds_clusters(multi_label: bool) -> None:
    def clusters(size: int, seed: int, split: str):  # type: ignore[no-untyped-def]
        labels = functional.one_hot(torch.arange(size) % 3, 3).float()
        features = {"visual_backbone": labels @ random(3, 8) + 0.1 * random(size, 8, seed=seed)}
        return split_features(features, labels, names="abc", split=split, multi_label=multi_label)

    run = evaluation(clusters(30, 1, "test"), clusters(60, 2, "train"))
    result = NearestNeighbours(bootstrap=20)(run)
    assert result["auroc"] == 1.0
    assert result["accuracy"] == 1.0
    on_itself = NearestNeighbours(bootstrap=20)(evaluation(clusters(60, 2, "train")))
    assert on_itself["accuracy"] == 1.0


def test_label_fractions_are_reported() -> None:
    def noisy(size: int, seed: int, split: str):  # type: ignore[no-untyped-def]
        labels = (random(size, 3, seed=seed) > 0).float()
        features = {"visual_backbone": labels @ random(3, 8) + random(size, 8, seed=seed + 1)}
        return split_features(features, labels, names="abc", split=split)

    train = noisy(400, 1, "train")
    run = evaluation(noisy(100, 5, "test"), train)
    result = NearestNeighbours(fractions=[1.0, 0.02, 0.2], bootstrap=10)(run)
    fits = [part["fit"] for part in result["fractions"]]
    assert [(fit["fraction"], fit["samples"]) for fit in fits] == [(0.02, 8), (0.2, 80), (1.0, 400)]
    areas = [part["auroc"] for part in result["fractions"]]
    assert areas[0] < areas[2] == result["auroc"]
    assert NearestNeighbours(bootstrap=10)(run)["auroc"] == result["auroc"]
    alone = NearestNeighbours(fractions=[0.2], bootstrap=10)(evaluation(train))
    assert 0.5 < alone["auroc"] < 1


def test_null_without_labels_or_features() -> None:
    split = split_features({"visual": random(4, 3)})
    assert NearestNeighbours()(evaluation(split))["auroc"] is None
