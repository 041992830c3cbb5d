from __future__ import annotations

import copy
import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torchvision
from torch import Tensor, nn

from tests.small_dalles import dalle_batch, save_vae, tiny_dalle
from tests.small_models import (
    TINY_BERT,
    tiny_batch,
    tiny_cnn,
    tiny_convirt,
    tiny_encoder,
    tiny_gloria,
    tiny_simclr,
    tiny_spec,
    tiny_vae,
    tiny_views,
)
from tests.toy_models import ToyAutoencoder
from vilmedic.blocks.projection import PairedProjection, VisualEmbedder, VisualProjection
from vilmedic.blocks.repeated import (
    checkpoint_blocks,
    compile_blocks,
    layers_of,
    repeated_blocks,
)
from vilmedic.blocks.text import WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.sections import TrainorSection
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.contract import Batch, ContrastiveModel, Model
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.dalle import DALLE
from vilmedic.models.gloria import GLoRIA
from vilmedic.models.simclr import SimCLR
from vilmedic.training.parallel import prepare_network

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("resnet18", {"BasicBlock": 8}),
        ("densenet121", {"_DenseBlock": 4, "_Transition": 3}),
        ("convnext_tiny", {"Conv2dNormActivation": 1, "CNBlock": 18, "Sequential": 3}),
        ("vit_b_32", {"EncoderBlock": 12}),
        ("vgg11", {}),
    ],
)
def test_repeated_blocks_are_found(network: str, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        blocks = repeated_blocks(torchvision.models.get_model(network))
    assert Counter(type(block).__name__ for block in blocks) == expected


def test_uncalled_modules_are_not_blocks() -> None:
    pairs = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(3))
    assert repeated_blocks(nn.ModuleList([pairs, nn.Sequential(nn.Linear(2, 2), nn.ReLU())])) == []


def vae_batch() -> dict[str, Tensor]:
    return {"images": torch.rand(4, 3, 16, 16)}


def two_layers() -> dict[str, Any]:
    return {**TINY_BERT, "num_hidden_layers": 2}


def first_stage() -> VisionEncoder:
    """Four residual blocks with 48 features."""
    return tiny_cnn(output_layer="stage2")


def convirt(_: Path) -> ConVIRT:
    projection = PairedProjection(
        visual_embedding_dim=48, textual_embedding_dim=16, projection_dim=8
    )
    return ConVIRT(
        spec=tiny_spec(),
        encoder=tiny_encoder(**two_layers()),
        cnn=first_stage(),
        projection=projection,
        loss=ConVIRTLoss(),
    )


def simclr(_: Path) -> SimCLR:
    projection = VisualProjection(visual_embedding_dim=48, projection_dim=8)
    return SimCLR(cnn=first_stage(), projection=projection, loss=NTXentLoss())


def gloria(_: Path) -> GLoRIA:
    return tiny_gloria(
        encoder=WordEncoder(spec=tiny_spec(), last_n_layers=1, **two_layers()),
        cnn=first_stage(),
        visual_embedder=VisualEmbedder(interm_feature_dim=48, feature_dim=48),
    )


def dalle(folder: Path) -> DALLE:
    return tiny_dalle(save_vae(folder / "vae.pth"), depth=3)


SYSTEMS = {
    "ConVIRT": (convirt, tiny_batch, 4 + 2),
    "SimCLR": (simclr, tiny_views, 4),
    "GLoRIA": (gloria, tiny_batch, 4 + 2),
    "VAE": (
        lambda _: tiny_vae(),
        vae_batch,
        5,
    ),  # each is a downsampling, upsampling or residual block
    "DALLE": (dalle, dalle_batch, 3),
}
"""Each system, a batch, and the number of its repeated layers."""


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Model, Batch, int]:
    build, batch, blocks = SYSTEMS[request.param]
    return build(tmp_path).train(), batch(), blocks


def counting_backend(graphs: list[Any], calls: list[Any]) -> Any:
    """Runs graphs unchanged, and records those that are compiled and those that are called."""

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            calls.append(graph)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    return backend


def test_every_repeated_layer_is_compiled(
    system: tuple[Model, Batch, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is one graph that is called once; equal layers share it."""
    model, batch, blocks = system
    graphs, calls = [], []
    backend = counting_backend(graphs, calls)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with caplog.at_level(logging.INFO, logger="vilmedic"):
        prepare_network(model, TrainorSection(compile=True), CPU)
    model(batch)["loss"].backward()
    assert len(calls) == blocks
    assert len({type(block) for block in model.repeated_blocks()}) <= len(graphs) < 8
    assert f"Compiling {blocks} blocks" in caplog.text


def test_the_forward_pass_has_no_graph_breaks(system: tuple[Model, Batch, int]) -> None:
    """No line of the five systems, their losses or transformers breaks the graph."""
    model, batch, _ = system
    graphs, calls = [], []
    results = []
    whole = torch.compile(model.forward, backend=counting_backend(graphs, calls))
    for forward in (whole, model.forward):
        torch.manual_seed(3)
        model.zero_grad()
        loss = forward(batch)["loss"]
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss, torch.nn.utils.get_total_norm(gradients)))
    assert len(graphs) == len(calls) == 1
    torch.testing.assert_close(*results)


def test_checkpointing_computes_every_repeated_layer_twice(
    system: tuple[Model, Batch, int], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch, blocks = system
    calls: Counter[nn.Module] = Counter()

    def counted(block: nn.Module, forward: Any, *args: Any, **kw: Any) -> Any:
        calls[block] += 1
        return forward(*args, **kw)

    for block in model.repeated_blocks():
        block.forward = partial(counted, block, block.forward)
    with caplog.at_level(logging.INFO, logger="vilmedic"):
        prepare_network(model, TrainorSection(activation_checkpointing=True), CPU)
    model(batch)["loss"].backward()
    assert list(calls.values()) == [2] * blocks
    assert f"Computing {blocks} blocks twice" in caplog.text


def test_a_layer_is_computed_at_most_twice() -> None:
    """With a model that already recomputes its layers, also compiled."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)))
    blocks = list(model)
    assert checkpoint_blocks(blocks) == checkpoint_blocks(blocks) == 2
    inner = [block.forward.args[1] for block in blocks]
    assert inner == [type(block).forward.__get__(block) for block in blocks]
    blocks[0].requires_grad_(False)
    assert checkpoint_blocks(blocks) == 1


def test_a_model_without_repeated_layers_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    for key in ("compile", "activation_checkpointing"):
        prepare_network(ToyAutoencoder(), TrainorSection(**{key: True}), CPU)
        assert f"trainor.{key} has no effect: this model has no repeated blocks" in caplog.text


@pytest.mark.parametrize(
    ("build", "batch"),
    [(tiny_convirt, tiny_batch(6)), (tiny_simclr, tiny_views(6)), (tiny_gloria, tiny_batch(6))],
)
@pytest.mark.parametrize("chunk", [None, 3])
def test_activation_checkpointing_does_not_change_results(build, batch, chunk: int | None) -> None:
    torch.manual_seed(0)
    model: ContrastiveModel = build(forward_batch_size=chunk).train()
    peer = copy.deepcopy(model)
    names = list(model.state_dict())
    assert checkpoint_blocks(model.repeated_blocks()) > 3

    results = []
    for one in (model, peer):
        torch.manual_seed(7)
        loss = one(batch)["loss"]
        loss.backward()
        results.append((loss, torch.rand(())))

    assert results[0] == results[1]
    assert list(model.state_dict()) == names
    for (name, a), b in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(model.named_buffers(), peer.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_activation_checkpointing_keeps_less_memory(tmp_path: Path) -> None:
    """Counts each memory region once, with the inputs of blocks and without weights."""
    model, batch = dalle(tmp_path).train(), dalle_batch()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes_kept() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(batch)["loss"]
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        del loss  # keeps all counted tensors alive, so that no memory is counted twice
        return sum(kept.values())

    before = bytes_kept()
    checkpoint_blocks(model.repeated_blocks())
    for block in model.repeated_blocks():
        block.register_forward_pre_hook(lambda block, inputs: (keep(inputs[0]), *inputs[1:]))
    assert bytes_kept() < before / 2


def test_compiling_blocks_keeps_names_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda function: lambda *args, **kw: function(*args, **kw)
    )
    model = tiny_convirt().eval()
    expected, names = model(tiny_batch())["loss"], list(model.state_dict())
    compile_blocks(model.repeated_blocks())
    assert list(model.state_dict()) == names
    assert torch.equal(model(tiny_batch())["loss"], expected)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (
            "resnet18",
            ["embedding", *(f"layer{n}.{m}" for n in range(1, 5) for m in (0, 1)), "head"],
        ),
        (
            "vit_b_32",
            ["embedding", *(f"encoder.layers.encoder_layer_{n}" for n in range(12)), "head"],
        ),
    ],
)
def test_layers_are_in_order_and_hold_every_parameter_once(network: str, names: list[str]) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(network)
    layers = layers_of(model)
    assert [layer.name for layer in layers] == names
    held = [name for layer in layers for name in layer.parameters]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    assert len(set(held)) == len(held)
    inside = {id(value) for value in layers[0].modules[0].parameters()}
    assert inside <= {id(value) for value in layers[0].parameters.values()}


def test_embedding_and_head_parameters_are_assigned() -> None:
    with torch.device("meta"):
        layers = layers_of(torchvision.models.vit_b_32())
    assert {"class_token", "encoder.pos_embedding"} < layers[0].parameters.keys()
    assert {"encoder.ln.weight", "heads.head.weight"} < layers[-1].parameters.keys()


def test_a_network_without_blocks_is_one_layer() -> None:
    [layer] = layers_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert (layer.name, len(layer.parameters)) == ("embedding", 4)
