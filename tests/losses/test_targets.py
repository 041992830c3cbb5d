from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertModel

from tests.losses.targets import slow_both_ways
from tests.small_models import save_tiny_bert, tiny_batch, tiny_convirt, tiny_spec, tiny_tokenizer
from vilmedic.blocks.pretrained import Filled, network_configs
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import ArgumentError, ConfigError
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.targets import Targets
from vilmedic.models.convirt import ConVIRT
from vilmedic.training.parallel import prepare_network

T = 0.05


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A published text encoder with its tokenizer."""
    return save_tiny_bert(tmp_path / "bert")


def by_reports(encoder: Path, **settings: Any) -> Targets:
    return Targets(spec=tiny_spec(), by="reports", encoder=str(encoder), temperature=T, **settings)


def batch_of(size: int = 6) -> dict[str, Tensor]:
    """A batch with at least two equal reports."""
    batch = tiny_batch(size)
    batch["images"] = batch["images"].double()
    for key in ("input_ids", "attention_mask"):
        batch[key][-1] = batch[key][0]
    return batch


def model_with(targets: Targets) -> ConVIRT:
    torch.manual_seed(1)
    return tiny_convirt(targets=targets).double().eval()


def slow_agreements(folder: Path, batch: dict[str, Tensor]) -> list[list[float]]:
    """From the library itself, report by report without padding."""
    network = BertModel.from_pretrained(folder).double().eval()
    means = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        with torch.no_grad():
            states = network(input_ids=ids[mask.bool()][None]).last_hidden_state
        means.append(states[0].mean(0))
    cosines = [[functional.cosine_similarity(x, y, dim=0) for x in means] for y in means]
    return [[float(((cosine - 1) / T).exp()) for cosine in row] for row in cosines]


def test_the_loss_uses_the_similarities_of_the_reports(bert: Path) -> None:
    batch, model = batch_of(), model_with(by_reports(bert))
    features = model.encode(batch)
    agreed = slow_agreements(bert, batch)
    assert agreed[0][-1] == pytest.approx(1, abs=1e-12)
    assert min(map(min, agreed)) < 0.5
    units = [functional.normalize(features[name], dim=1) for name in ("visual", "linguistic")]
    rows, columns = slow_both_ways(units[0] @ units[1].T / 0.1, agreed)
    expected = 0.75 * rows + 0.25 * columns
    whole = model(batch)["loss"]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-10)
    model.forward_batch_size = 2
    torch.testing.assert_close(model(batch)["loss"], whole, rtol=0, atol=1e-10)


def test_chunks_give_the_gradients_of_the_whole_batch(bert: Path) -> None:
    found = []
    for size in (None, 2):
        model = model_with(by_reports(bert))
        model.forward_batch_size = size
        model(batch_of())["loss"].backward()
        found.append([value.grad for value in model.parameters() if value.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_target_encoder_is_not_part_of_the_model_and_frozen(bert: Path) -> None:
    model, plain = model_with(by_reports(bert)).train(), tiny_convirt()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    batch = batch_of()
    first, second = (model.encode(batch)["targets"] for _ in range(2))
    assert not first.requires_grad
    assert torch.equal(first, second)  # without dropout
    assert torch.equal(first, model.eval().encode(batch)["targets"])


def test_loading_the_encoder_uses_no_random_numbers(bert: Path) -> None:
    state = torch.get_rng_state()
    by_reports(bert)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_from_a_checkpoint_loads_the_encoder_only_for_the_loss(bert: Path) -> None:
    batch = batch_of()
    trained = model_with(by_reports(bert))
    stated = network_configs(trained)
    filled = Filled(stated)
    again = model_with(by_reports(bert, filled=filled))
    assert network_configs(again) == stated
    torch.testing.assert_close(again(batch)["loss"], trained(batch)["loss"], rtol=0, atol=0)
    shutil.rmtree(bert)
    away = model_with(by_reports(bert, filled=filled))
    assert network_configs(away) == stated
    alone = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert away.encode(alone).keys() == {"linguistic"}


@pytest.mark.parametrize("other", [True, False])
def test_without_encoder_weights_evaluation_has_no_loss_and_training_fails(
    bert: Path, other: bool, caplog: pytest.LogCaptureFixture
) -> None:
    filled = Filled(network_configs(model_with(by_reports(bert))))
    shutil.rmtree(bert)
    if other:
        save_tiny_bert(bert, seed=1)
    expected = "are not those that this model was trained with" if other else "there is no folder"
    model = model_with(by_reports(bert, filled=filled))
    with caplog.at_level(logging.WARNING):
        features = [model.encode(batch_of()) for _ in range(2)][-1]
    assert model.lacks(features) == ["targets"]
    assert caplog.text.count(expected) == 1
    model = model_with(by_reports(bert, filled=filled))
    with pytest.raises(ConfigError, match=rf"^model\.targets\.encoder: .*{expected}"):
        prepare_network(model, TrainorSection(batch_size=4), torch.device("cpu"))


def test_the_encoder_must_have_the_tokenizer_of_the_reports(bert: Path) -> None:
    tiny_tokenizer(["other", "words"]).save_pretrained(bert)
    with pytest.raises(ArgumentError, match=r"encoder: .*dataset\.seq\.tokenizer"):
        by_reports(bert)


def test_a_missing_target_encoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="encoder: not given"):
        Targets(spec=tiny_spec(), by="reports")
    with pytest.raises(ArgumentError, match="encoder: there is no folder"):
        by_reports(tmp_path / "none")


def test_the_settings_are_shown(bert: Path) -> None:
    assert by_reports(bert).extra_repr() == "soft, by reports under bert, temperature 0.05"
    assert ConVIRTLoss().lambda_ == 0.75  # used by the slow loss above
