from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.distributed.systems import Compared
from tests.small_models import (
    several_images,
    tiny_batch,
    tiny_convirt,
    tiny_gloria,
    tiny_simclr,
    tiny_views,
)
from vilmedic.losses.barlow_twins import BarlowTwinsLoss
from vilmedic.losses.info_nce import InfoNCELoss
from vilmedic.losses.siglip import SigLIPLoss
from vilmedic.losses.vicreg import VICRegLoss
from vilmedic.models import constant_memory
from vilmedic.models.constant_memory import join
from vilmedic.models.contract import Batch, ContrastiveModel, Features

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


class Pairs(ContrastiveModel):
    """Two linear maps with dropout, a learned temperature, a mask and an unused feature."""

    def __init__(self, dropout: float = 0.5, forward_batch_size: int | None = None) -> None:
        super().__init__(forward_batch_size)
        self.image = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(dropout))
        self.text = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Dropout(dropout))
        self.head = nn.Linear(32, 4)
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))
        self.with_graph: list[bool] = []

    def encode(self, batch: Batch) -> Features:
        self.with_graph.append(torch.is_grad_enabled())
        return {
            "temperature": self.log_temperature.exp(),
            "visual": self.head(self.image(batch["images"])),
            "linguistic": self.head(self.text(batch["words"])),
            "mask": batch["images"][:, 0] > -1,
            "unused": self.head(self.image(batch["images"])),
        }

    def contrast(self, features: Features) -> dict[str, Tensor]:
        logits = features["visual"] @ features["linguistic"].T / features["temperature"]
        logits = logits.masked_fill(~features["mask"], -9.0)
        return {"loss": functional.cross_entropy(logits, torch.arange(len(logits)))}


def pairs_batch(size: int, dtype: torch.dtype = torch.float64) -> Batch:
    random = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(size, 6, generator=random, dtype=dtype) for name in ("images", "words")
    }


def kept_graphs(model: ContrastiveModel, batch: Batch) -> Tensor:
    """Reference: the loss of the same chunks with all graphs in memory."""
    features = [model.encode(chunk) for chunk in model.chunks(batch)]
    assert len(features) > 2
    return model.contrast(join(features))["loss"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(given: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=0, atol=bound, msg=name)


def doubled(batch: Batch) -> Batch:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def convirt() -> ContrastiveModel:
    return tiny_convirt(forward_batch_size=4)


def simclr() -> ContrastiveModel:
    return tiny_simclr(forward_batch_size=4)


def gloria() -> ContrastiveModel:
    return tiny_gloria(forward_batch_size=4)


SYSTEMS = pytest.mark.parametrize(
    ("build", "batch"),
    [
        (convirt, tiny_batch(9)),
        (simclr, tiny_views(9)),
        (gloria, tiny_batch(9)),
        (convirt, several_images(tiny_batch(9))),
        (simclr, several_images(tiny_views(9))),
        (gloria, several_images(tiny_batch(9))),
    ],
    ids=[f"{name}{kind}" for kind in ("", " studies") for name in ("ConVIRT", "SimCLR", "GLoRIA")],
)


@SYSTEMS
def test_gradient_and_statistics_equal_those_of_kept_graphs(
    build: Callable[[], ContrastiveModel], batch: Batch
) -> None:
    torch.manual_seed(0)
    model = build().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    peer = copy.deepcopy(model)
    batch = doubled(batch)

    torch.manual_seed(7)
    expected = kept_graphs(peer, batch)
    expected.backward()
    drawn = torch.rand(())
    torch.manual_seed(7)
    loss = model(batch)["loss"]
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.rand(()) == drawn, "the random state advances as if every chunk was encoded once"
    assert_same(gradients(model), gradients(peer), 1e-10)
    buffers = dict(peer.named_buffers())
    assert any("running_var" in name for name in buffers)
    assert_same(dict(model.named_buffers()), buffers, 0)


@pytest.mark.parametrize("loss", [InfoNCELoss, SigLIPLoss, VICRegLoss, BarlowTwinsLoss])
def test_learned_loss_parameters_get_the_right_gradient(loss: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Compared(loss(), forward_batch_size=4).double()
    peer = copy.deepcopy(model)
    batch = pairs_batch(9)

    kept_graphs(peer, batch).backward()
    model(batch)["loss"].backward()

    assert_same(gradients(model), gradients(peer), 1e-12)
    for name, weight in model.loss.named_parameters():
        assert weight.shape == (1,)
        assert gradients(model)[f"loss.{name}"].abs() > 1e-3


@SYSTEMS
def test_without_batch_statistics_chunks_equal_the_whole_batch(
    build: Callable[[], ContrastiveModel], batch: Batch
) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    whole = copy.deepcopy(model)
    whole.forward_batch_size = None
    batch = doubled(batch)

    model(batch)["loss"].backward()
    whole(batch)["loss"].backward()

    assert_same(gradients(model), gradients(whole), 1e-10)


def test_learned_temperature_masks_and_unused_features() -> None:
    torch.manual_seed(0)
    model = Pairs(forward_batch_size=4).double()
    peer = copy.deepcopy(model)
    batch = pairs_batch(10)

    torch.manual_seed(7)
    kept_graphs(peer, batch).backward()
    torch.manual_seed(7)
    model(batch)["loss"].backward()

    assert model.log_temperature.grad is not None
    assert model.log_temperature.grad.abs() > 1e-3
    assert_same(gradients(model), gradients(peer), 1e-12)
    assert model.with_graph == [False] * 3 + [True] * 3


def test_frozen_encoder_gets_no_gradient() -> None:
    model = Pairs(forward_batch_size=4).double()
    model.image.requires_grad_(False)
    model.log_temperature.requires_grad_(False)
    torch.manual_seed(7)
    kept_graphs(model, pairs_batch(10)).backward()
    expected = {name: value.clone() for name, value in gradients(model).items()}
    model.zero_grad()
    torch.manual_seed(7)
    model(pairs_batch(10))["loss"].backward()
    assert not any(name.startswith("image") for name in expected)
    assert_same(gradients(model), expected, 1e-12)


def test_dropout_masks_must_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Different masks in the second pass silently give the gradient of another loss."""

    def flat_gradient(forget: bool) -> Tensor:
        torch.manual_seed(0)
        model = Pairs(forward_batch_size=8).double()
        torch.manual_seed(7)
        with monkeypatch.context() as patch:
            if forget:
                patch.setattr(constant_memory._RandomState, "restore", lambda self: None)
            model(pairs_batch(64))["loss"].backward()
        return torch.cat([value.flatten() for value in gradients(model).values()])

    torch.manual_seed(0)
    peer = Pairs(forward_batch_size=8).double()
    torch.manual_seed(7)
    kept_graphs(peer, pairs_batch(64)).backward()
    right = torch.cat([value.flatten() for value in gradients(peer).values()])

    assert functional.cosine_similarity(flat_gradient(forget=True), right, dim=0) < 0.8
    assert functional.cosine_similarity(flat_gradient(forget=False), right, dim=0) > 1 - 1e-12


def test_two_batches_can_be_processed_at_once() -> None:
    torch.manual_seed(0)
    model = tiny_simclr(forward_batch_size=3).double().train()
    peer = copy.deepcopy(model)
    batches = [doubled(tiny_views(9, seed=seed)) for seed in (1, 2)]

    sum(model(batch)["loss"] for batch in batches).backward()
    sum(kept_graphs(peer, batch) for batch in batches).backward()

    assert_same(gradients(model), gradients(peer), 1e-10)
    assert_same(dict(model.named_buffers()), dict(peer.named_buffers()), 0)


def test_without_gradients_chunks_are_encoded_once() -> None:
    model = Pairs(forward_batch_size=4).double()
    with torch.no_grad():
        model(pairs_batch(10))
    assert model.with_graph == [False] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@SYSTEMS
def test_reduced_precision_with_a_scaled_loss(
    build: Callable[[], ContrastiveModel], batch: Batch, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = build().train()
    peer = copy.deepcopy(model)
    # untrained GLoRIA overflows above this; at 2 already on CPUs with native float16 products
    scale = 0.125 if dtype is torch.float16 else 1.0

    torch.manual_seed(7)
    with torch.autocast("cpu", dtype):
        expected = kept_graphs(peer, batch)
    (expected * scale).backward()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype):
        loss = model(batch)["loss"]
    (loss * scale).backward()

    assert loss.item() == expected.item()
    given, wanted = (torch.cat([g.flatten() for g in gradients(m).values()]) for m in (model, peer))
    # Kept graphs sum the chunks in the reduced precision, replayed ones in float32.
    difference = ((given - wanted).norm() / wanted.norm()).item()
    assert difference < (2e-2 if dtype is torch.bfloat16 else 3e-3)


def test_prepare_runs_on_one_chunk_at_a_time() -> None:
    sizes = []

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        sizes.append(len(batch["images"]))
        return {name: value.double() / 8 for name, value in batch.items()}

    raw = {name: (value * 8).round().int() for name, value in pairs_batch(10).items()}
    model = Pairs(dropout=0.0, forward_batch_size=4).double()
    model(raw, prepare)["loss"].backward()
    given = {name: value.clone() for name, value in gradients(model).items()}
    model.zero_grad()
    model(prepare(raw))["loss"].backward()

    assert sizes == [4, 3, 3, 4, 3, 3, 10]
    assert_same(given, gradients(model), 1e-12)


def test_features_of_unequal_shape_are_refused() -> None:
    chunks = [{"words": torch.zeros(2, 3)}, {"words": torch.zeros(2, 4)}]
    with pytest.raises(ValueError, match=r"'words' as \[2, 3\] and \[2, 4\]"):
        join(chunks)


def test_random_state_of_a_gpu_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    states = {device: torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda at: states[at])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: states.update({at: state}))
    saved = constant_memory._RandomState({device, torch.device("cpu")})
    states[device] = torch.tensor([2])
    saved.restore()
    assert states[device].item() == 1
