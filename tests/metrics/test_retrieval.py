from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.evaluations import evaluation, random, split_features
from tests.reading import REPORTS, gloria_evaluation
from vilmedic.errors import ConfigError
from vilmedic.metrics.retrieval import Retrieval, cosines, count_ahead


def slow(queries: Tensor, targets: Tensor) -> tuple[list[int], list[int]]:
    """Counts of candidates above and beside the true one, by pairs."""
    above, beside = [], []
    for i, query in enumerate(queries.double()):
        scores = [(query @ t / query.norm() / t.norm()).item() for t in targets.double()]
        above.append(sum(s > scores[i] + 1e-9 for s in scores))
        beside.append(sum(abs(s - scores[i]) <= 1e-9 for s in scores) - 1)
    return above, beside


@pytest.mark.parametrize("block_size", [1, 7, 50, 1000])
def test_ranks_agree_with_a_slow_reference(block_size: int) -> None:
    visual = random(50, 6)
    linguistic = visual + 1.5 * random(50, 6, seed=1)
    linguistic[10:14] = linguistic[10]
    above, beside = count_ahead(cosines(visual, linguistic), 50, block_size=block_size)
    expected = slow(visual, linguistic)
    assert above.tolist() == expected[0]
    assert beside.tolist() == expected[1]
    assert beside[10:14].tolist() == [3, 3, 3, 3]


def test_numbers_are_those_of_the_ranks() -> None:
    visual, linguistic = random(30, 4), random(30, 4, seed=1)
    result = Retrieval(block_size=8)(
        evaluation(split_features({"visual": visual, "linguistic": linguistic}))
    )
    for direction, pair in (
        ("image_to_text", (visual, linguistic)),
        ("text_to_image", (linguistic, visual)),
    ):
        ranks = torch.tensor(slow(*pair)[0]) + 1
        for k in (1, 5, 10):
            share = (ranks <= k).double().mean().item()
            assert result[f"{direction}_r{k}"] == pytest.approx(share)
        half = ranks.double().quantile(0.5).item()
        assert result[f"{direction}_median_rank"] == half


def test_a_perfect_model_finds_everything() -> None:
    x = random(20, 8)
    result = Retrieval()(evaluation(split_features({"visual": x, "linguistic": 3 * x})))
    assert result["image_to_text_r1"] == 1.0
    assert result["text_to_image_median_rank"] == 1.0


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_a_constant_model_scores_chance(fill: float) -> None:
    x = torch.full((40, 300), fill)
    result = Retrieval(block_size=7)(evaluation(split_features({"visual": x, "linguistic": x})))
    assert result["image_to_text_r1"] == pytest.approx(1 / 40)
    assert result["image_to_text_r10"] == pytest.approx(10 / 40)
    assert result["image_to_text_median_rank"] == 20.5


def test_without_text_or_with_broken_features_it_is_null() -> None:
    x = random(5, 3)
    broken = x.clone()
    broken[2, 1] = torch.nan
    for features in ({"visual": x}, {"visual": x, "linguistic": broken}):
        result = Retrieval()(evaluation(split_features(features)))
        assert set(result.values()) == {None}


def test_one_sample_is_found() -> None:
    x = random(1, 3)
    result = Retrieval()(evaluation(split_features({"visual": x, "linguistic": -x})))
    assert result["image_to_text_r1"] == 1.0


@pytest.mark.parametrize("aggregation", ["max", "sum"])
@pytest.mark.parametrize("similarity", ["local", "both"])
def test_words_and_regions_rank_the_candidates(
    tmp_path: Path, similarity: Literal["local", "both"], aggregation: Literal["max", "sum"]
) -> None:
    run = gloria_evaluation(tmp_path)
    metric = Retrieval(similarity=similarity, local_aggregation=aggregation, block_size=2)
    metric.check(run)
    scores = run.local_similarity(REPORTS, aggregation)
    visual, linguistic = run.feature("visual"), run.feature("linguistic")
    assert scores is not None
    assert visual is not None
    assert linguistic is not None
    if similarity == "both":
        whole = functional.cosine_similarity(visual[:, None], linguistic[None], dim=2)
        scores = (whole + scores) / 2
    result = metric(run)
    for direction, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        ranks = 1 + (table > table.diagonal()[:, None]).sum(dim=1)
        assert result[f"{direction}_r1"] == pytest.approx((ranks == 1).double().mean().item())
        assert result[f"{direction}_median_rank"] == ranks.median().item()
    plain = evaluation(split_features({"visual": random(2, 3)}))
    plain.networks.members = [lambda: torch.nn.Linear(1, 1)]
    with pytest.raises(ConfigError, match=rf"retrieval\.similarity: given {similarity}: Linear"):
        metric.check(plain)


def test_memory_stays_within_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    matmul = Tensor.__matmul__

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        product = matmul(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    count_ahead(cosines(random(100, 4), random(100, 4)), 100, block_size=10)
    assert largest == 100
