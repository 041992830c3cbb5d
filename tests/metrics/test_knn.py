from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tests.evaluations import evaluation, random, split_features
from vilmedic.errors import ConfigError
from vilmedic.metrics import knn
from vilmedic.metrics.knn import NearestNeighbours, vote


@pytest.mark.parametrize("block", [1 << 24, 40])
def test_votes_agree_with_a_slow_reference(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(knn, "BLOCK", block)
    queries, voters = random(9, 5), random(20, 5, seed=1)
    votes = (random(20, 3, seed=2) > 0).float()
    shares = vote(queries, voters, votes, k=4, temperature=0.1, leave_out_itself=False)
    for query, share in zip(queries, shares, strict=True):
        similarity = functional.cosine_similarity(query[None], voters)
        nearest = sorted(range(20), key=lambda j: -similarity[j].item())[:4]
        weights = [math.exp(similarity[j].item() / 0.1) for j in nearest]
        for column in range(3):
            expected = sum(
                w * votes[j, column].item() for w, j in zip(weights, nearest, strict=True)
            )
            assert share[column].item() == pytest.approx(expected / sum(weights), abs=1e-5)


def test_a_sample_does_not_vote_for_itself() -> None:
    x, votes = random(6, 4), torch.eye(6)
    shares = vote(x, x, votes, k=10, temperature=0.07, leave_out_itself=True)
    assert shares.diagonal().abs().max() == 0
    assert shares.sum(dim=1) == pytest.approx([1.0] * 6)


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


def test_null_without_labels_or_features() -> None:
    split = split_features({"visual": random(4, 3)})
    assert NearestNeighbours()(evaluation(split))["auroc"] is None
    with pytest.raises(ConfigError, match="at least 1"):
        NearestNeighbours(k=0)
