from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils._device import _device_constructors

from tests.distributed.systems import (
    Pairs,
    build,
    compare,
    make_batches,
    pairs_batch,
    parts_of,
    train,
)
from tests.several_processes import CPU, run_checks
from tests.small_models import tiny_encoder
from vilmedic.blocks.text_image_transformer import TextImageTransformer
from vilmedic.device import autocast
from vilmedic.distributed import processes
from vilmedic.distributed.gather import copy_from_main, gather_rows
from vilmedic.errors import ConfigError
from vilmedic.training import parallel
from vilmedic.training.averaged_weights import AveragedWeights
from vilmedic.training.radam import RAdam

CLIPPED = {"clip_grad_norm": 0.5}
RADAM: dict[str, Any] = {"optimizer": "RAdam", "optim_params": {"lr": 1e-3}}
REAL = ("ConVIRT", "SimCLR", "GLoRIA", "VAE", "DALLE")


def convirt() -> Any:
    return compare("ConVIRT", double=True, steps=2, **CLIPPED)


def simclr() -> Any:
    return compare("SimCLR", double=True, steps=2, **CLIPPED)


def gloria() -> Any:
    return compare("GLoRIA", double=True, steps=2, **CLIPPED)


def simclr_of_studies_in_chunks() -> Any:
    settings = {"forward_batch_size": 2}
    return compare("SimCLR of studies", double=True, settings=settings, **CLIPPED)


def gloria_of_studies_in_chunks() -> Any:
    settings = {"forward_batch_size": 2}
    return compare("GLoRIA of studies", double=True, settings=settings, **CLIPPED)


def vae() -> Any:
    return compare("VAE", steps=2, **CLIPPED)


def dalle() -> Any:
    return compare("DALLE", steps=2, **CLIPPED)


def weights_that_a_step_leaves_out() -> Any:
    return compare("VaryingCoin", (8,), steps=3, **CLIPPED)


def convirt_in_chunks() -> Any:
    return compare("ConVIRT", settings={"forward_batch_size": 2}, **CLIPPED)


def simclr_in_chunks() -> Any:
    return compare("SimCLR", settings={"forward_batch_size": 2}, **CLIPPED)


def gloria_in_chunks() -> Any:
    return compare("GLoRIA", settings={"forward_batch_size": 2}, **CLIPPED)


def any_loss_with_learned_temperature() -> Any:
    return compare("Pairs", steps=3, **CLIPPED)


def any_loss_with_learned_temperature_in_chunks() -> Any:
    return compare("Pairs", steps=3, settings={"forward_batch_size": 2}, **CLIPPED)


def no_interaction() -> Any:
    return compare("Autoencoder", (8, 8, 1), steps=3)


def synchronized_statistics() -> Any:
    return compare("ConVIRT", norm=True, double=True, sync_bn=True, **CLIPPED)


def sharded_convirt() -> Any:
    return compare("ConVIRT", double=True, parallel="fsdp", steps=2, **CLIPPED)


def sharded_simclr() -> Any:
    return compare("SimCLR", double=True, parallel="fsdp", steps=2, **CLIPPED)


def sharded_gloria() -> Any:
    return compare("GLoRIA", double=True, parallel="fsdp", steps=2, **CLIPPED)


def sharded_vae() -> Any:
    return compare("VAE", double=True, parallel="fsdp", steps=2, **CLIPPED)


def sharded_vae_in_parts() -> Any:
    """Small blocks of codes and images, so that layers are called several times."""
    from vilmedic.blocks import autoencoder
    from vilmedic.models import vae

    whole = autoencoder.BLOCK, vae.PART
    autoencoder.BLOCK, vae.PART = 60, 2 * 8 * 16**2
    try:
        return sharded_vae()
    finally:
        autoencoder.BLOCK, vae.PART = whole


def sharded_dalle() -> Any:
    return compare("DALLE", double=True, parallel="fsdp", steps=2, **CLIPPED)


def sharded_dalle_computed_twice() -> Any:
    keys = {"parallel": "fsdp", "activation_checkpointing": True, "steps": 2}
    return compare("DALLE", double=True, **keys, **CLIPPED)


def sharded_gloria_in_chunks() -> Any:
    settings = {"forward_batch_size": 2}
    return compare("GLoRIA", double=True, parallel="fsdp", steps=2, settings=settings, **CLIPPED)


def sharded_gloria_one_by_one() -> Any:
    """In the last batch one process has one sample, and so one chunk, more than the other."""
    settings = {"forward_batch_size": 1}
    return compare("GLoRIA", (8, 5), double=True, parallel="fsdp", settings=settings, **CLIPPED)


def sharded_autoencoder() -> Any:
    keys = {"optimizer": "AdamW", "optim_params": {"lr": 1e-3}}
    return compare("Autoencoder", (8, 8, 1), parallel="fsdp", steps=3, **keys)


def gloria_told_by_the_host() -> Any:
    """As on a GPU, where the words of a report are counted on the host."""

    def move(batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
        return batch | {"host_word_count": (batch["word_ids"].amax(1) + 1).tolist()}

    with mock.patch("vilmedic.training.step.move", move):
        return compare("GLoRIA", settings={"forward_batch_size": 2}, **CLIPPED)


def statistics_of_the_first() -> dict[str, Any]:
    """Running statistics and their average after steps, and after the exchange."""
    model: Any = build("ConVIRT", norm=True)
    average = AveragedWeights(model, 0.5)
    broadcasts = []
    send = dist.broadcast
    with mock.patch("torch.distributed.broadcast", lambda *of: broadcasts.append(of) or send(*of)):
        step, _ = train(model, make_batches("ConVIRT", [16]))
        made = len(broadcasts)
        own, parts = parts_of(make_batches("ConVIRT", [16]))
        for number in (1, 2):
            average.update(number, step(own, parts).taken)
        in_steps = len(broadcasts) - made

    def state() -> list[Tensor]:
        values = [value.clone() for value in model.buffers()]
        return [*values, *(value.clone() for value in average.buffers())]

    before = state()
    step.parallel.share_buffers()
    copy_from_main(average.buffers())
    return {"in steps": in_steps, "before": before, "after": state()}


def radam() -> Any:
    """The class that replaces torch's RAdam on a GPU."""
    with mock.patch("torch.optim.RAdam", RAdam):
        return compare("Autoencoder", (8, 8, 1), steps=7, **RADAM)


def sharded_radam() -> Any:
    with mock.patch("torch.optim.RAdam", RAdam):
        return compare("Autoencoder", (8, 8, 1), parallel="fsdp", steps=7, **RADAM)


LARS_OPTIONS = {"lr": 0.1, "trust_coefficient": 0.2, "weight_decay": 0.1}
LARS: dict[str, Any] = {"optimizer": "LARS", "optim_params": LARS_OPTIONS}


def lars() -> Any:
    return compare("Autoencoder", (8, 8, 1), steps=4, **LARS)


def sharded_lars() -> Any:
    """Layer norms are those of whole tensors, although each process has only a part."""
    return compare("Autoencoder", (8, 8, 1), parallel="fsdp", steps=4, **LARS)


EQUAL = [
    lars,
    sharded_lars,
    gloria_told_by_the_host,
    radam,
    sharded_radam,
    convirt,
    simclr,
    gloria,
    vae,
    dalle,
    weights_that_a_step_leaves_out,
    convirt_in_chunks,
    simclr_in_chunks,
    gloria_in_chunks,
    simclr_of_studies_in_chunks,
    gloria_of_studies_in_chunks,
    any_loss_with_learned_temperature,
    any_loss_with_learned_temperature_in_chunks,
    no_interaction,
    synchronized_statistics,
    sharded_convirt,
    sharded_simclr,
    sharded_gloria,
    sharded_vae,
    sharded_vae_in_parts,
    sharded_dalle,
    sharded_dalle_computed_twice,
    sharded_gloria_in_chunks,
    sharded_gloria_one_by_one,
    sharded_autoencoder,
]


def wrong_gradients() -> dict[str, Tensor]:
    """The gradients of one process, of our method, and of two common wrong methods."""
    batches = make_batches("Pairs", [64])
    (own,), (part,) = parts_of(batches)

    def loss_of(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        forth = first @ everyone["linguistic"].T / 0.1
        back = second @ everyone["visual"].T / 0.1
        both = functional.cross_entropy(forth, target) + functional.cross_entropy(back, target)
        return both / 2

    def averaged(loss: Tensor, model: nn.Module) -> Tensor:
        grads = torch.autograd.grad(
            loss, [model.image.weight, model.text[0].weight], retain_graph=True
        )
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        return flat / processes.world_size()

    def encode(model: Pairs, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = model.encode(batch)
        return {k: functional.normalize(found[k], dim=1) for k in ("visual", "linguistic")}

    gradients = {}
    model = build("Pairs")
    everyone = encode(model, batches[0])
    whole = torch.arange(64)
    loss = loss_of(everyone["visual"], everyone["linguistic"], whole)
    gradients["one process"] = averaged(loss, model)

    mine = encode(model, own)
    everyone = {k: part.gather(v) for k, v in mine.items()}
    target = part.places(mine["visual"])
    gradients["ours"] = averaged(loss_of(mine["visual"], mine["linguistic"], target), model)

    detached = {k: gather_rows(v.detach(), part.sizes) for k, v in mine.items()}
    everyone = detached
    loss = loss_of(mine["visual"], mine["linguistic"], target)
    gradients["local loss, gathered without gradient"] = averaged(loss, model)

    everyone = {k: v.clone() for k, v in detached.items()}
    for key, value in mine.items():
        everyone[key][target] = value
    loss = loss_of(everyone["visual"], everyone["linguistic"], whole)
    gradients["global loss, gathered without gradient"] = averaged(loss, model)
    return gradients


def temperatures() -> dict[str, float]:
    """A learned temperature after some steps: ours, and one outside the wrapped module."""
    step, _ = train(build("Pairs"), make_batches("Pairs", [8]), steps=5)
    ours = step.model.log_temperature.item()

    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 6))
    outside = nn.Parameter(torch.tensor(0.5))
    optimizer = torch.optim.SGD([*model.parameters(), outside], lr=0.1)
    batch = pairs_batch(8, seed=processes.rank())
    for _ in range(5):
        logits = model(batch["images"]) @ batch["words"].T / outside
        functional.cross_entropy(logits, torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"ours": ours, "outside": outside.item()}


def searched() -> dict[str, bool]:
    """Whether DDP searches the graph for unused weights from the second step on."""
    found = {}
    for system in (*REAL, "Pairs", "VaryingCoin"):
        step, _ = train(build(system), make_batches(system, [8]))
        found[system] = step.parallel.network.find_unused_parameters
    return found


def weights_left_out_without_a_word() -> str:
    with pytest.raises(ConfigError) as error:
        train(build("Coin"), make_batches("Coin", [8]), steps=3)
    return str(error.value)


def groups_of_blocks() -> dict[str, list[int]]:
    """For each system, the numbers of sharded weight groups and of blocks."""
    found = {}
    for system in REAL:
        step, _ = train(build(system), make_batches(system, [8]), parallel="fsdp")
        sharded = [m for m in step.model.modules() if isinstance(m, FSDPModule)]
        found[system] = [len(sharded), len(step.model.repeated_blocks())]
    return found


def sixteen_bits() -> dict[str, Any]:
    """Layers that are gathered in bfloat16, as on GPUs, and those of one process."""
    policy = parallel.precision_of
    parallel.precision_of = lambda block, precision, _: policy(block, precision, "cuda")
    try:
        keys: dict[str, Any] = {"precision": "bf16", "parallel": "fsdp"}
        given, expected = compare("Stack", **keys)
        step, _ = train(build("Stack"), make_batches("Stack", [8]), **keys)
    finally:
        parallel.precision_of = policy
    types = [step.model.layers[-1].types, {str(p.grad.dtype) for p in step.parameters}]
    with parallel.gathered(step.model), torch.no_grad(), autocast(CPU, "bf16"):
        loss = step.model(make_batches("Stack", [8])[0])["loss"]
    seen = [list(one) for one in types]
    return {"given": given, "expected": expected, "types": seen, "evaluated": loss}


OTHERS = [
    wrong_gradients,
    temperatures,
    statistics_of_the_first,
    searched,
    weights_left_out_without_a_word,
    groups_of_blocks,
    sixteen_bits,
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_checks([*EQUAL, *OTHERS], tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("check", EQUAL, ids=lambda check: check.__name__)
def test_two_processes_equal_one(check: Any, results: dict[str, list[Any]]) -> None:
    for result in results[check.__name__]:
        assert not isinstance(result, str), result
    (given, expected), (other, _) = results[check.__name__]
    assert given["gradients"].keys() == expected["gradients"].keys()
    assert given["samples"] == expected["samples"] == other["samples"]
    assert given["parts"].keys() == expected["parts"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(given["gradients"][name], gradient, rtol=0, atol=1e-6, msg=name)
    for name in ("loss", "norm"):
        torch.testing.assert_close(given[name], expected[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(given[name], other[name]), name
    for name, value in expected["parts"].items():
        torch.testing.assert_close(given["parts"][name], value, rtol=1e-5, atol=1e-6)
    for name, value in expected["state"].items():
        torch.testing.assert_close(given["state"][name], value, rtol=1e-5, atol=1e-6)
        if other["state"][name] is not None:
            assert torch.equal(given["state"][name], other["state"][name]), name


def test_clipping_and_batch_statistics_are_active(results: dict[str, list[Any]]) -> None:
    given, expected = results["convirt"][0]
    total = torch.cat([g.flatten() for g in given["gradients"].values()]).norm()
    assert expected["norm"] > 0.5
    assert total.item() == pytest.approx(0.5, rel=1e-3)
    state = results["synchronized_statistics"][0][0]["state"]
    assert any((v != 0).any() for k, v in state.items() if k.endswith("running_mean"))


def test_running_statistics_are_exchanged_on_request(results: dict[str, list[Any]]) -> None:
    first, second = results["statistics_of_the_first"]
    for result in (first, second):
        assert not isinstance(result, str), result
        assert result["in steps"] == 0
    pairs = list(zip(first["before"], second["before"], strict=True))
    assert not all(torch.equal(one, other) for one, other in pairs)
    for one, after, other in zip(first["before"], first["after"], second["after"], strict=True):
        assert torch.equal(one, after)
        assert torch.equal(one, other)


def test_common_wrong_gradients_differ(results: dict[str, list[Any]]) -> None:
    """Common errors of data-parallel contrastive training, which this package avoids."""
    gradients = results["wrong_gradients"][0]
    assert not isinstance(gradients, str), gradients
    right = gradients["one process"]
    torch.testing.assert_close(gradients["ours"], right, rtol=0, atol=1e-6)
    half = gradients["global loss, gathered without gradient"]
    torch.testing.assert_close(half, right / 2, rtol=0, atol=1e-6)
    local = gradients["local loss, gathered without gradient"]
    assert 0.8 < functional.cosine_similarity(local, right, dim=0) < 0.95


def test_a_temperature_outside_the_wrapped_module_drifts(results: dict[str, list[Any]]) -> None:
    one, other = results["temperatures"]
    assert one["ours"] == other["ours"] != -1.0
    assert abs(one["outside"] - other["outside"]) > 1e-3


def test_the_graph_is_searched_only_if_weights_are_unused(
    results: dict[str, list[Any]],
) -> None:
    for found in results["searched"]:
        assert found == {**dict.fromkeys(REAL, False), "Pairs": True, "VaryingCoin": True}


def test_a_weight_that_becomes_unused_is_refused(results: dict[str, list[Any]]) -> None:
    for message in results["weights_left_out_without_a_word"]:
        assert "the weight 'sides.1.weight' had a gradient in the first step" in message
        assert "varying = True" in message


def test_each_block_is_sharded_separately(results: dict[str, list[Any]]) -> None:
    for found in results["groups_of_blocks"]:
        assert not isinstance(found, str), found
        for system, (groups, blocks) in found.items():
            assert groups == blocks + 1 > 2, system  # one more group for everything else


def test_layers_are_gathered_in_16_bits_and_gradients_in_32(results: dict[str, list[Any]]) -> None:
    one, other = results["sixteen_bits"]
    assert not isinstance(one, str), one
    assert one["types"] == [
        ["torch.bfloat16", "torch.float32"],
        ["torch.float32"],
    ]
    for name, gradient in one["expected"]["gradients"].items():
        error = (one["given"]["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 2**-7, name
    assert one["evaluated"] == other["evaluated"]
    for name, value in one["given"]["state"].items():
        assert value.dtype == torch.float32, name


@pytest.mark.parametrize(
    ("block", "precision", "device", "expected"),
    [
        (nn.TransformerEncoderLayer(8, 2), "bf16", "cuda", torch.bfloat16),
        (nn.TransformerEncoderLayer(8, 2), "fp16", "cuda", torch.float16),
        (nn.TransformerEncoderLayer(8, 2), "fp32", "cuda", None),
        (nn.TransformerEncoderLayer(8, 2), "bf16", "cpu", None),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), "bf16", "cuda", None),
    ],
)
def test_which_parameters_are_gathered_in_16_bits(
    block: nn.Module, precision: str, device: str, expected: torch.dtype | None
) -> None:
    policy = parallel.precision_of(block, precision, device)
    assert policy.param_dtype == expected
    assert policy.reduce_dtype == (None if expected is None else torch.float32)


def test_gpu_autocast_supports_layers_with_16_bit_weights() -> None:
    """For example layer normalisation of float32 states with weights in 16 bits."""
    # transformers replaces torch.linspace while it builds a model, and torch may then permanently
    # register the replacement as the function that follows the device of a `with` statement.
    _device_constructors.cache_clear()
    kept = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            layers = TextImageTransformer(dim=16, depth=2, heads=2, dim_head=12, text_len=5, side=3)
            reports = tiny_encoder(num_hidden_layers=2)
            for module in (layers.layers, reports.network.encoder):
                for parameter in module.parameters():
                    parameter.data = parameter.data.bfloat16()
            states = layers(torch.empty(2, layers.length, 16))
            ids = torch.ones(2, 6, dtype=torch.int64)
            encoded = reports(ids, ids)
    finally:
        torch.set_autocast_enabled("cuda", kept[0])
        torch.set_autocast_dtype("cuda", kept[1])
    assert states.dtype == torch.float32, "the residual stream stays in float32"
    assert encoded.dtype == torch.bfloat16
