from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from vilmedic.config.sections import TrainorSection
from vilmedic.models.contract import ContrastiveModel, Model
from vilmedic.training.averaged_weights import AveragedWeights
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.resume import Progress
from vilmedic.training.step import (
    FIRST_SCALE,
    STEPS_TO_GROW,
    LossScale,
    StepResult,
    Tally,
    TrainingStep,
)

CPU = torch.device("cpu")


class Regression(Model):
    """Mean squared error of a linear map; its batch statistics do not affect the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.norm(batch["x"])
        return {"loss": functional.mse_loss(self.linear(batch["x"])[:, 0], batch["y"])}


def make_step(
    model: Model, *, optimizer: str = "SGD", lr: float = 0.1, **keys: Any
) -> TrainingStep:
    section = TrainorSection(optimizer=optimizer, optim_params={"lr": lr}, **keys)
    return TrainingStep(model, lambda batch: batch, make_optimizer(model, section), section, CPU)


def batches(sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator)
    y = torch.randn(sum(sizes), dtype=torch.float64, generator=generator)
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    return [{"index": torch.arange(len(a)), "x": a, "y": b} for a, b in parts]


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [4, 4, 4, 3], [4, 1]])
def test_accumulated_gradient_equals_one_big_batch(sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = Regression()
    group = batches(sizes)
    x, y = torch.cat([b["x"] for b in group]), torch.cat([b["y"] for b in group])
    weight = model.linear.weight.detach().clone().requires_grad_()
    bias = model.linear.bias.detach().clone().requires_grad_()
    expected_loss = sum((weight[0] @ a + bias[0] - b) ** 2 for a, b in zip(x, y, strict=True))
    expected_loss = expected_loss / len(x)
    expected_loss.backward()

    if sizes[-1] == 1:
        model.norm.eval()
    result = make_step(model)(group)

    assert result.loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)
    assert result.samples == sum(sizes)
    torch.testing.assert_close(model.linear.weight.grad, weight.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.linear.bias.grad, bias.grad, rtol=0, atol=1e-12)


def test_clipping_limits_the_update_and_reports_the_unclipped_norm() -> None:
    model = Regression()
    before = copy.deepcopy(model)

    result = make_step(model, clip_grad_norm=0.01)(batches([4]))

    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    )
    assert result.grad_norm > 0.01
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RAdam", "RMSprop"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing(optimizer: str, poison: float) -> None:
    model = Regression()
    step = make_step(model, optimizer=optimizer)
    step(batches([4, 4]))
    before = copy.deepcopy([model.state_dict(), step.optimizer.state_dict()["state"]])
    group = batches([4, 4])
    group[1]["x"][0, 0] = poison

    result = step(group)

    assert not result.taken
    assert result.bad
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, before[0][name]), name
    for index, state in step.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            same = value == before[1][index][name]
            assert torch.as_tensor(same).all(), name
    assert step(batches([4, 4])).taken


def test_published_optimizers_are_fused() -> None:
    for name in ("Adam", "AdamW", "SGD"):
        assert make_step(Regression(), optimizer=name).optimizer.param_groups[0]["fused"], name


class Embedding(Model):
    """A sequence of float32 layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = self.head(self.layers(batch["x"].float()))[:, 0]
        return {
            "loss": functional.mse_loss(found.float(), batch["y"].float()),
            "largest": found.detach().float().amax(),
            "found": found,
        }


class Contrastive(ContrastiveModel):
    def __init__(self) -> None:
        super().__init__(forward_batch_size=2)
        self.layers = Embedding().layers

    def encode(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"visual": self.layers(batch["x"].float())}

    def contrast(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        visual = features["visual"].float()
        return {"loss": (visual - visual.roll(1, 0)).square().mean()}


class Waits(TorchDispatchMode):
    """Records operations at which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", [Embedding, Contrastive])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_device(build: type[Model], precision: str) -> None:
    model = build()
    keys = {"precision": precision, "clip_grad_norm": 1.0, "optimizer": "AdamW"}
    step, average = make_step(model, **keys), AveragedWeights(model, 0.9)
    tally = Tally(CPU, Progress().tally)
    with Waits() as waits:
        for number in range(1, 4):
            result = step(batches([4, 4]))
            tally.add(result)
            average.update(number, result.taken)
        assert waits.seen == []
        assert result.loss.item() > 0
    assert waits.seen == ["_local_scalar_dense"]
    assert tally.mean_loss() > 0


def test_number_of_calls_for_statistics_is_constant() -> None:
    counts = []
    for layers in (2, 40):
        model = Embedding()
        model.layers = nn.Sequential(*model.layers, *(nn.BatchNorm1d(8) for _ in range(layers)))
        step = make_step(model, optimizer="AdamW", precision="bf16")
        step(batches([4]))
        with Called() as called:
            step(batches([4]))
        assert called.names["clone"] == 0
        counts.append({name: called.names[name] for name in ("cat", "where", "_foreach_copy_")})
    assert counts[0] == counts[1]


class Called(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_other_scalars_are_averaged_over_the_samples() -> None:
    model = Embedding()
    model.layers.eval()
    group = batches([4, 2])
    expected = sum(model(b)["largest"].item() * len(b["x"]) for b in group) / 6
    parts = make_step(model)(group).parts
    assert parts.keys() == {"largest"}
    assert parts["largest"].item() == pytest.approx(expected)


def test_float16_with_loss_scale_is_close_to_float32() -> None:
    grads = []
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        model = Embedding()
        step = make_step(model, lr=0.0, precision=precision, clip_grad_norm=0.1)
        while True:
            torch.manual_seed(1)
            if step(batches([8])).taken:
                break
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert grads[-1].norm().item() == pytest.approx(0.1, rel=1e-3)
    torch.testing.assert_close(*grads, rtol=0, atol=2e-4)


def test_loss_scale_backoff_is_not_a_bad_step() -> None:
    """A gradient above 65504 overflows in float16; the scale falls until it fits."""
    torch.manual_seed(0)
    model = Embedding()
    step = make_step(model, precision="fp16", lr=1e-6)
    group = batches([8])
    group[0]["y"] *= 3e3
    results = [step(group) for _ in range(20)]
    taken = [bool(result.taken) for result in results]
    assert not taken[0]
    assert taken[-1]
    assert taken == sorted(taken)
    assert not any(result.bad for result in results)
    assert step.scale.value == 2.0 ** (16 - taken.count(False))


def test_non_finite_loss_is_a_bad_step_in_float16() -> None:
    step = make_step(Embedding(), precision="fp16")
    group = batches([8])
    group[0]["y"][0] = float("nan")
    assert step(group).bad


@pytest.mark.parametrize("fused", [None, True])
def test_a_skipped_first_step_leaves_no_momentum(fused: bool | None) -> None:
    torch.manual_seed(0)
    model = Embedding()
    peer = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    section = TrainorSection(optim_params=options | ({"fused": True} if fused else {}))
    section.optimizer = "SGD"
    steps = [
        TrainingStep(one, lambda batch: batch, make_optimizer(one, section), section, CPU)
        for one in (model, peer)
    ]
    damaged = batches([8])
    damaged[0]["y"][0] = float("nan")
    assert not steps[0](damaged).taken
    assert not steps[0].optimizer.state, "its momentum would be uninitialised memory"
    for number in range(3):
        for step in steps:
            torch.manual_seed(number)
            assert step(batches([8])).taken
    for one, other in zip(model.parameters(), peer.parameters(), strict=True):
        assert torch.equal(one, other)


CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def test_loss_scale_halves_on_overflow_and_doubles_later() -> None:
    scale = LossScale("fp16", CPU)
    scale.update(NO)
    assert scale.value == FIRST_SCALE / 2
    for _ in range(STEPS_TO_GROW - 1):
        scale.update(YES)
    assert scale.value == FIRST_SCALE / 2
    scale.update(YES)
    assert scale.value == FIRST_SCALE
    scale.update(YES)
    assert scale.value == FIRST_SCALE


def test_loss_scale_is_never_below_one() -> None:
    scale = LossScale("fp16", CPU)
    for _ in range(40):
        scale.update(NO)
    assert scale.value == 1
    assert not scale.can_shrink()


def test_other_precisions_have_no_loss_scale() -> None:
    scale = LossScale("bf16", CPU)
    scale.update(NO)
    loss = torch.tensor(3.0)
    assert scale.scale(loss) is loss
    assert not scale.can_shrink()


def test_loss_scale_state_is_restored() -> None:
    first, second = LossScale("fp16", CPU), LossScale("fp16", CPU)
    first.update(NO)
    for _ in range(STEPS_TO_GROW - 1):
        first.update(YES)
    second.load_state_dict(first.state_dict())
    second.update(YES)
    assert second.value == FIRST_SCALE


def test_a_loss_scale_of_one_stays() -> None:
    first, second = LossScale("fp16", CPU), LossScale("fp16", CPU)
    for _ in range(20):
        first.update(NO)
    second.load_state_dict(first.state_dict())
    assert second.value == 1


CPU = torch.device("cpu")


def result(loss: float, *, taken: bool = True, bad: bool = False) -> StepResult:
    values = (torch.tensor(value) for value in (loss, 1.0, taken, bad))
    return StepResult(*values, samples=2, parts={})


def test_mean_covers_the_steps_taken() -> None:
    tally = Tally(CPU, Progress().tally)
    assert math.isnan(tally.mean_loss())
    for one in (result(1.0), result(math.nan, taken=False, bad=True), result(4.0)):
        tally.add(one)
    assert tally.mean_loss() == 2.5
    tally.start_epoch()
    assert math.isnan(tally.mean_loss())


def test_consecutive_bad_steps_between_reads_are_counted() -> None:
    tally = Tally(CPU, Progress().tally)
    bad, back_off = result(1.0, taken=False, bad=True), result(1.0, taken=False)
    for one in (bad, bad, back_off, bad, result(1.0), bad):
        tally.add(one)
    assert tally.bad_steps() == (4, 3)
    assert tally.bad_steps() == (4, 1)
    tally.add(bad)
    assert tally.bad_steps() == (5, 2)


def test_meter_continues_after_a_read() -> None:
    first = Tally(CPU, Progress().tally)
    first.add(result(0.1))
    second = Tally(CPU, first.read())
    for tally in (first, second):
        tally.add(result(0.2))
    assert first.read() == second.read()
    assert first.mean_loss() == pytest.approx(0.15)
