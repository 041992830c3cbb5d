from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.pairs_on_disk import REPORTS, gloria_evaluation
from tests.toy_models import ToyData, ToyModel
from vilmedic.evaluation import local_features as local
from vilmedic.evaluation.evaluation import Ensemble
from vilmedic.evaluation.features import RawPixels
from vilmedic.models.gloria import GLoRIA

TEXTS = ["No effusion.", "Heart is normal.", "Left.", "No effusion."]


def prepared(run: Any) -> dict[str, Tensor]:
    [batch] = list(gloria_batches(run))
    return run.dataset.prepare(batch)


def gloria_batches(run: Any) -> Any:
    from vilmedic.datasets.loader import make_loader

    return make_loader(run.dataset, batch_size=9, training=False, seed=0, num_workers=0)


def slow_similarity(model: GLoRIA, run: Any, aggregation: Literal["sum", "max"]) -> Tensor:
    """Reference: image by image and text by text."""
    model.eval()
    regions = model.encode({"images": prepared(run)["images"]})["regions"]
    found = torch.empty(len(regions), len(TEXTS))
    for column, text in enumerate(TEXTS):
        encoded = model.encode_text(run.dataset.encode_text([text]))
        for row in range(len(regions)):
            found[row, column] = model.local_similarity(
                regions[row : row + 1],
                encoded["words"],
                encoded["word_mask"],
                aggregation=aggregation,
            )
    return found.detach()


@pytest.mark.parametrize("aggregation", ["sum", "max"])
@pytest.mark.parametrize(("batch", "memory"), [(64, 2**30), (2, 2**30), (2, 0)])
def test_every_image_is_compared_with_every_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    aggregation: Literal["sum", "max"],
    batch: int,
    memory: int,
) -> None:
    monkeypatch.setattr(local, "BATCH", batch)
    monkeypatch.setattr(local, "MEMORY", memory)
    run = gloria_evaluation(tmp_path)
    for _ in range(2):
        found = run.local_similarity(TEXTS, aggregation)
        assert found is not None
        slow = slow_similarity(run.networks.members[0](), run, aggregation)
        torch.testing.assert_close(found, slow)
        assert torch.equal(found[:, 0], found[:, 3])


def test_an_ensemble_averages_local_similarities(tmp_path: Path) -> None:
    run = gloria_evaluation(tmp_path, models=2)
    alone = [slow_similarity(member(), run, "max") for member in run.networks.members]
    torch.testing.assert_close(run.local_similarity(TEXTS, "max"), (alone[0] + alone[1]) / 2)
    maps = run.attention([1, 4])
    assert maps is not None
    for place, index in enumerate((1, 4)):
        both = [slow_attention(member(), run, index) for member in run.networks.members]
        torch.testing.assert_close(maps[place], (both[0] + both[1]) / 2)


@pytest.mark.parametrize("memory", [2**30, 0])
def test_regions_of_all_images_of_a_study_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(local, "MEMORY", memory)
    run = gloria_evaluation(tmp_path, multi_image=3)
    model, batch = run.networks.members[0]().eval(), prepared(run)
    texts = model.encode_text(run.dataset.encode_text(TEXTS))
    rows = []
    for images, mask in zip(batch["images"], batch["images_mask"], strict=True):
        regions = model.encode({"images": images[mask]})["regions"]
        rows.append(
            model.local_similarity(
                regions.transpose(0, 1).flatten(1)[None],
                texts["words"],
                texts["word_mask"],
                aggregation="max",
            )
        )
    for _ in range(2):  # computed, then cached
        torch.testing.assert_close(run.local_similarity(TEXTS, "max"), torch.cat(rows).detach())
    maps = run.attention([2])
    assert maps is not None
    assert maps[0].shape[1:] == (4, 4)  # of the first image
    torch.testing.assert_close(maps[0].sum(dim=(1, 2)), torch.ones(len(maps[0])))


def test_all_image_keys_are_passed_to_prepare(tmp_path: Path) -> None:
    run = gloria_evaluation(tmp_path, multi_image=3)
    networks, seen = run.networks, set()
    prepare, batches = run.dataset.prepare, list(networks.loader(run.dataset))

    def watched(batch: dict[str, Any]) -> dict[str, Any]:
        seen.update(batch)
        return prepare(batch)

    run.dataset.prepare = watched
    numbers = {"augmentation": torch.zeros(2, 3, 1)}  # random numbers of a preset for whole batches
    networks.loader = lambda data: [batch | numbers for batch in batches]
    assert run.local_similarity(TEXTS, "max") is not None
    assert {"images", "images_mask", "augmentation"} <= seen
    assert "input_ids" not in seen


def test_regions_are_cached_while_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = GLoRIA.encode

    def counted(self: GLoRIA, batch: Any) -> Any:
        calls.append(len(batch["images"]))
        return encode(self, batch)

    run = gloria_evaluation(tmp_path)
    monkeypatch.setattr(GLoRIA, "encode", counted)
    run.local_similarity(TEXTS, "max")
    run.local_similarity(["Right."], "sum")
    assert calls == [2, 2, 1]
    run.networks.forget()
    run.local_similarity(TEXTS, "max")
    assert len(calls) == 6

    monkeypatch.setattr(local, "MEMORY", 1)
    run.networks.forget()
    run.local_similarity(TEXTS, "max")
    run.local_similarity(TEXTS, "max")
    assert len(calls) == 12


def slow_attention(model: GLoRIA, run: Any, index: int) -> Tensor:
    batch = {key: value[index : index + 1] for key, value in prepared(run).items()}
    features = model.eval().encode(batch)
    mask = features["word_mask"]
    return model.attention(features["regions"], features["words"], mask)[mask].detach()


def test_attention_has_one_map_per_word_without_the_closing_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "BATCH", 2)
    run = gloria_evaluation(tmp_path)
    chosen = [4, 0, 1]
    maps = run.attention(chosen)
    assert maps is not None
    model = run.networks.members[0]()
    assert model.training
    for index, found in zip(chosen, maps, strict=True):
        torch.testing.assert_close(found, slow_attention(model, run, index))
        model.train()
        words = run.dataset.words(REPORTS[index])
        assert len(found) == len(words) - 1
        torch.testing.assert_close(found.flatten(1).sum(dim=1), torch.ones(len(found)))


@pytest.mark.parametrize("network", [RawPixels(), ToyModel()])
def test_models_without_local_features_are_an_error(network: torch.nn.Module) -> None:
    networks = Ensemble(
        members=[lambda: network],
        dataset=lambda split: ToyData(split),
        loader=lambda data: data.batches(4),
        device=torch.device("cpu"),
        precision="fp32",
    )
    assert networks.local.similarity("test", ["a"], "max") is None
    assert networks.local.attention(ToyData(), [0]) is None


def test_data_without_reports_are_an_error(tmp_path: Path) -> None:
    run = gloria_evaluation(tmp_path)
    run.networks.dataset = lambda split: object()
    assert run.local_similarity(TEXTS, "max") is None
