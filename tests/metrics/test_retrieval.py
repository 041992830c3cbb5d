from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.made_up_evaluations import Lines, evaluation, random, split_features
from tests.pairs_on_disk import REPORTS, gloria_evaluation
from vilmedic.errors import ConfigError
from vilmedic.metrics import retrieval
from vilmedic.metrics.retrieval import Retrieval, cosines, count_ahead


def slow(queries: Tensor, targets: Tensor) -> tuple[list[int], list[int]]:
    """Numbers of candidates ranked above the true one and tied with it, pair by pair."""
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
    found = count_ahead(cosines(visual, linguistic), block_size=block_size)
    for direction, pair in (
        ("image_to_text", (visual, linguistic)),
        ("text_to_image", (linguistic, visual)),
    ):
        above, beside = found[direction]
        expected = slow(*pair)
        assert above.tolist() == expected[0]
        assert beside.tolist() == expected[1]
    assert found["image_to_text"][1][10:14].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("threads", [1, 3])
def test_tiled_ranks_equal_those_of_the_whole_matrix(threads: int) -> None:
    """More than one strip per side, and not a multiple of any block size."""
    count = 2309
    visual = random(count, 5).round(decimals=1)
    linguistic = (visual + random(count, 5, seed=1)).round()  # few values, so many ties
    table = functional.normalize(visual.double(), dim=1) @ (
        functional.normalize(linguistic.double(), dim=1).T
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = count_ahead(cosines(visual, linguistic), block_size=4096)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for direction, similarity in (("image_to_text", table), ("text_to_image", table.T)):
        lead = similarity - similarity.diagonal().unsqueeze(1)
        above, beside = found[direction]
        assert torch.equal(above, (lead > 1e-9).sum(dim=1).double())
        assert torch.equal(beside, (lead.abs() <= 1e-9).sum(dim=1).double() - 1)
    assert found["image_to_text"][1].max() > 100


def test_cpu_and_generic_tile_counts_agree() -> None:
    own_rows, own_columns = random(300).double(), random(530, seed=1).double()
    lead = random(300, 530, seed=2).double().round(decimals=1)  # with ties
    own_rows, own_columns = own_rows.round(decimals=1), own_columns.round(decimals=1)
    counts = []
    for compare in (retrieval._compare_on_cpu, retrieval._compare):
        of_rows = torch.ones(2, 300, dtype=torch.int64)
        of_columns = torch.ones(2, 530, dtype=torch.int64)
        compare(lead.clone(), own_rows, own_columns, of_rows, of_columns)
        counts.append((of_rows, of_columns))
    for one, other in zip(*counts, strict=True):
        assert torch.equal(one, other)
        assert (one[1] > one[0]).any()


def test_equal_reports_are_ties_in_any_batch() -> None:
    visual = random(40, 8)
    linguistic = visual + 0.1 * random(40, 8, seed=1)
    rounding = 1 + 1e-6 * random(20, 8, seed=2)
    linguistic[20:] = linguistic[:20] * rounding
    run = evaluation(split_features({"visual": visual, "linguistic": linguistic}))

    class Repeating(Lines):
        def describe(self, index: int) -> dict[str, Any]:
            return {"image": [f"{index}.png"], "report": f"report {index % 20}"}

    run.dataset = Repeating()
    result = Retrieval()(run)
    linguistic[20:] = linguistic[:20]
    exact = evaluation(split_features({"visual": visual, "linguistic": linguistic}))
    assert result == Retrieval()(exact)


def test_progress_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(retrieval.Progress, "update", lambda self, number: told.append(number))
    count_ahead(cosines(random(300, 4), random(300, 4)), block_size=100)
    assert sum(told) == 300
    assert len(told) > 1


def test_numbers_follow_from_the_ranks() -> None:
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


def test_missing_text_or_non_finite_features_give_null() -> None:
    x = random(5, 3)
    broken = x.clone()
    broken[2, 1] = torch.nan
    for features in ({"visual": x}, {"visual": x, "linguistic": broken}):
        result = Retrieval()(evaluation(split_features(features)))
        assert set(result.values()) == {None}


def test_a_single_sample_is_found() -> None:
    x = random(1, 3)
    result = Retrieval()(evaluation(split_features({"visual": x, "linguistic": -x})))
    assert result["image_to_text_r1"] == 1.0


@pytest.mark.parametrize("aggregation", ["max", "sum"])
@pytest.mark.parametrize("similarity", ["local", "both"])
def test_local_similarity_ranks_the_candidates(
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
    with pytest.raises(ConfigError, match=rf"^similarity: given {similarity}, but Linear"):
        metric.check(plain)


def test_memory_stays_within_the_blocks() -> None:
    largest = 0
    leads = cosines(random(100, 4), random(100, 4))

    def watched(rows: slice, columns: slice, out: Tensor) -> object:
        nonlocal largest
        largest = max(largest, out.numel())
        return leads.write(rows, columns, out)

    count_ahead(leads._replace(write=watched), block_size=10)
    assert largest == 100


def alike_pairs(tied: bool = False) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Twelve samples of three classes; with `tied`, embeddings on a coarse grid with many ties."""
    drawn = torch.Generator().manual_seed(5)
    images = torch.randn(12, 4, generator=drawn)
    reports = images + torch.randn(12, 4, generator=drawn)
    if tied:
        images, reports = images.sign(), reports.sign()
    classes = torch.arange(12) % 3
    features = split_features(
        {"visual": images, "linguistic": reports}, torch.eye(3)[classes], names="abc"
    )
    unit = [functional.normalize(x.double(), dim=1) for x in (images, reports)]
    return features, unit[0] @ unit[1].T, classes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block_size", [5, 1024])
def test_precision_averages_over_orders_of_ties(tied: bool, block_size: int) -> None:
    features, similarity, classes = alike_pairs(tied)
    found = Retrieval(precision_at=[1, 5, 12, 13], block_size=block_size)(evaluation(features))
    generator = np.random.default_rng(0)
    for direction, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        for k in (1, 5, 12):
            total = 0.0
            for _ in range(1 if not tied else 4000):
                noise = torch.from_numpy(generator.random((12, 12))) * 1e-10
                first = (scores.round(decimals=9) + noise).argsort(dim=1, descending=True)[:, :k]
                total += (classes[first] == classes[:, None]).double().mean().item()
            expected = total / (4000 if tied else 1)
            assert found[f"{direction}_p{k}"] == pytest.approx(expected, abs=0.01 if tied else 1e-9)
        assert found[f"{direction}_p13"] is None, "there are no thirteen candidates"


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_of_several_right_candidates_counts(tied: bool) -> None:
    features, similarity, classes = alike_pairs(tied)
    found = Retrieval(positives=["strict", "same_labels"])(evaluation(features))
    strict = Retrieval()(evaluation(features))
    assert {key: found[key] for key in strict} == strict
    generator = np.random.default_rng(1)
    draws = 4000 if tied else 1
    for direction, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        ranks = torch.zeros(12)
        hits = dict.fromkeys((1, 5), 0.0)
        for _ in range(draws):
            noise = torch.from_numpy(generator.random((12, 12))) * 1e-10
            order = (scores.round(decimals=9) + noise).argsort(dim=1, descending=True)
            first = (classes[order] == classes[:, None]).double().argmax(dim=1) + 1
            ranks += first / draws
            for k in hits:
                hits[k] += (first <= k).double().mean().item() / draws
        bound = 0.01 if tied else 1e-9
        for k, expected in hits.items():
            assert found[f"same_labels_{direction}_r{k}"] == pytest.approx(expected, abs=bound)
        median = torch.quantile(ranks, 0.5).item()
        rank = found[f"same_labels_{direction}_median_rank"]
        assert rank == pytest.approx(median, abs=0.1 if tied else 1e-9)


def test_same_text_counts_identical_reports_as_correct() -> None:
    features, _, _ = alike_pairs()
    given = evaluation(features)
    texts = ["a", "b", "c"]
    given.dataset = SimpleNamespace(
        describe=lambda i: {"image": [f"{i}.png"], "report": texts[i % 3]}
    )
    reports = features.features["linguistic"]
    reports[:] = reports[torch.arange(12) % 3]  # equal texts have equal embeddings
    found = Retrieval(positives=["same_text", "same_labels"])(given)
    assert "image_to_text_r1" not in found
    numbers = [key for key in found if key.startswith("same_text_")]
    assert len(numbers) == 8
    for key in numbers:  # here texts and labels are the same
        assert found[key] == pytest.approx(found[key.replace("same_text", "same_labels")])
    assert found["same_text_image_to_text_r1"] > Retrieval()(given)["image_to_text_r1"]


def test_label_metrics_are_null_without_labels() -> None:
    features, _, _ = alike_pairs()
    features.labels = None
    found = Retrieval(positives="same_labels", precision_at=[5])(evaluation(features))
    assert found["same_labels_image_to_text_r1"] is found["text_to_image_p5"] is None
