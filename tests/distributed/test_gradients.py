from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tests.distributed.systems import (
    Pairs,
    build,
    compare,
    make_batches,
    pairs_batch,
    parts_of,
    train,
)
from tests.several_processes import run_checks
from vilmedic.distributed import processes
from vilmedic.distributed.gather import copy_from_main, gather_rows
from vilmedic.losses.barlow_twins import BarlowTwinsLoss
from vilmedic.losses.info_nce import InfoNCELoss
from vilmedic.losses.siglip import SigLIPLoss
from vilmedic.losses.vicreg import VICRegLoss
from vilmedic.training.optimization import AveragedWeights

CLIPPED = {"clip_grad_norm": 0.5}


def convirt() -> Any:
    return compare("ConVIRT", **CLIPPED)


def simclr() -> Any:
    return compare("SimCLR", **CLIPPED)


def gloria() -> Any:
    return compare("GLoRIA", **CLIPPED)


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


def sharded_gloria_in_chunks() -> Any:
    settings = {"forward_batch_size": 2}
    return compare("GLoRIA", double=True, parallel="fsdp", steps=2, settings=settings, **CLIPPED)


def sharded_gloria_one_by_one() -> Any:
    """Of the last batch one process has a sample, and so a chunk, more than the other."""
    settings = {"forward_batch_size": 1}
    return compare("GLoRIA", (8, 5), double=True, parallel="fsdp", settings=settings, **CLIPPED)


def sharded_autoencoder() -> Any:
    keys = {"optimizer": "AdamW", "optim_params": {"lr": 1e-3}}
    return compare("Autoencoder", (8, 8, 1), parallel="fsdp", steps=3, **keys)


def compare_losses(loss: nn.Module, chunks: int | None = None, **keys: Any) -> Any:
    settings = {"loss": loss, "forward_batch_size": chunks}
    return compare("Compared", (8, 5, 3), double=True, steps=3, settings=settings, **keys)


def info_nce() -> Any:
    return compare_losses(InfoNCELoss())


def info_nce_in_chunks() -> Any:
    return compare_losses(InfoNCELoss(), 2)


def siglip() -> Any:
    return compare_losses(SigLIPLoss())


def siglip_in_chunks() -> Any:
    return compare_losses(SigLIPLoss(), 2)


def sharded_info_nce_in_chunks() -> Any:
    return compare_losses(InfoNCELoss(), 2, parallel="fsdp")


def sharded_siglip() -> Any:
    return compare_losses(SigLIPLoss(), parallel="fsdp")


def vicreg_in_chunks() -> Any:
    return compare_losses(VICRegLoss(), 2)


def barlow_twins() -> Any:
    return compare_losses(BarlowTwinsLoss())


def gloria_told_by_the_host() -> Any:
    """As on a GPU, where the words of a report are counted before a batch moves."""

    def move(batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
        return batch | {"host_word_ids": batch["word_ids"].tolist()}

    with mock.patch("vilmedic.training.step.move", move):
        return compare("GLoRIA", settings={"forward_batch_size": 2}, **CLIPPED)


def statistics_of_the_first() -> dict[str, Any]:
    """Running statistics and their average after steps, and after they were exchanged."""
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


EQUAL = [
    gloria_told_by_the_host,
    convirt,
    simclr,
    gloria,
    convirt_in_chunks,
    simclr_in_chunks,
    gloria_in_chunks,
    any_loss_with_learned_temperature,
    any_loss_with_learned_temperature_in_chunks,
    no_interaction,
    synchronized_statistics,
    sharded_convirt,
    sharded_gloria_in_chunks,
    sharded_gloria_one_by_one,
    sharded_autoencoder,
]
LOSSES = [
    info_nce,
    info_nce_in_chunks,
    siglip,
    siglip_in_chunks,
    sharded_info_nce_in_chunks,
    sharded_siglip,
    vicreg_in_chunks,
    barlow_twins,
]


def wrong_gradients() -> dict[str, Tensor]:
    """The gradient of one process, of ours, and of two ways that are often taken instead."""
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
    """A learned temperature after some steps: ours, and one outside of what is wrapped."""
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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    others = [wrong_gradients, temperatures, statistics_of_the_first]
    return run_checks([*EQUAL, *LOSSES, *others], tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("check", EQUAL, ids=lambda check: check.__name__)
def test_two_processes_do_what_one_does(check: Any, results: dict[str, list[Any]]) -> None:
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


@pytest.mark.parametrize("check", LOSSES, ids=lambda check: check.__name__)
def test_losses_and_what_they_learn_in_two_processes(
    check: Any, results: dict[str, list[Any]]
) -> None:
    for result in results[check.__name__]:
        assert not isinstance(result, str), result
    (given, expected), (other, _) = results[check.__name__]
    assert given["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(given["gradients"][name], gradient, rtol=0, atol=1e-10, msg=name)
    for name, value in expected["state"].items():
        torch.testing.assert_close(given["state"][name], value, rtol=0, atol=1e-10, msg=name)
        if other["state"][name] is not None:
            assert torch.equal(given["state"][name], other["state"][name]), name
    for name, value in {"loss": expected["loss"], **expected["parts"]}.items():
        found = given["loss"] if name == "loss" else given["parts"][name]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    learned = [value for name, value in expected["gradients"].items() if name.startswith("loss.")]
    assert all(gradient.abs().max() > 1e-6 for gradient in learned)
    assert len(learned) == ("info_nce" in check.__name__) + 2 * ("siglip" in check.__name__)


def test_clipping_and_statistics_were_at_work(results: dict[str, list[Any]]) -> None:
    given, expected = results["convirt"][0]
    total = torch.cat([g.flatten() for g in given["gradients"].values()]).norm()
    assert expected["norm"] > 0.5
    assert total.item() == pytest.approx(0.5, rel=1e-3)
    state = results["synchronized_statistics"][0][0]["state"]
    assert any((v != 0).any() for k, v in state.items() if k.endswith("running_mean"))


def test_statistics_are_exchanged_when_they_are_asked_for(results: dict[str, list[Any]]) -> None:
    first, second = results["statistics_of_the_first"]
    for result in (first, second):
        assert not isinstance(result, str), result
        assert result["in steps"] == 0
    pairs = list(zip(first["before"], second["before"], strict=True))
    assert not all(torch.equal(one, other) for one, other in pairs)
    for one, after, other in zip(first["before"], first["after"], second["after"], strict=True):
        assert torch.equal(one, after)
        assert torch.equal(one, other)


def test_ways_that_are_wrong(results: dict[str, list[Any]]) -> None:
    """What data-parallel contrastive training often does, and what is not done here."""
    gradients = results["wrong_gradients"][0]
    assert not isinstance(gradients, str), gradients
    right = gradients["one process"]
    torch.testing.assert_close(gradients["ours"], right, rtol=0, atol=1e-6)
    half = gradients["global loss, gathered without gradient"]
    torch.testing.assert_close(half, right / 2, rtol=0, atol=1e-6)
    local = gradients["local loss, gathered without gradient"]
    assert 0.8 < functional.cosine_similarity(local, right, dim=0) < 0.95


def test_a_temperature_outside_of_the_wrapped_module_drifts(results: dict[str, list[Any]]) -> None:
    one, other = results["temperatures"]
    assert one["ours"] == other["ours"] != -1.0
    assert abs(one["outside"] - other["outside"]) > 1e-3
