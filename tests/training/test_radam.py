from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.fake_device import DEVICE, Waits
from vilmedic.config.sections import TrainorSection
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.radam import RAdam

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"maximize": True, "betas": (0.8, 0.9), "eps": 1e-3},
]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    return layers.to(memory_format=torch.channels_last)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        size = parameter.shape
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        parameter.grad = torch.empty_like(parameter).copy_(values)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_equal_those_of_torch(options: dict[str, Any]) -> None:
    ours, theirs = network(), network()
    one, other = (
        RAdam(ours.parameters(), lr=0.01, **options),
        torch.optim.RAdam(theirs.parameters(), lr=0.01, **options),
    )
    for step in range(20):  # the first five do not use the second moment
        for model, optimizer in ((ours, one), (theirs, other)):
            set_gradients(model, step)
            optimizer.step()
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("skipped", [(0, 1), (3,), (2, 9, 10)])
def test_a_skipped_step_changes_nothing(options: dict[str, Any], skipped: tuple[int, ...]) -> None:
    ours, theirs = network(), network()
    one, other = (
        RAdam(ours.parameters(), lr=0.01, **options),
        RAdam(theirs.parameters(), lr=0.01, **options),
    )
    for step in range(12):
        set_gradients(ours, step)
        one.found_inf = torch.tensor(float(step in skipped))
        if step in skipped:
            before = copy.deepcopy([ours.state_dict(), one.state_dict()["state"]])
            for parameter, bad in zip(ours.parameters(), (torch.nan, torch.inf) * 2, strict=True):
                assert parameter.grad is not None
                parameter.grad.fill_(bad)
        one.step()
        if step not in skipped:
            set_gradients(theirs, step)
            other.step()
        elif step > 0 and step - 1 not in skipped:
            now = one.state_dict()["state"]
            assert all(torch.equal(v, before[0][k]) for k, v in ours.state_dict().items())
            for index, state in before[1].items():
                assert all(torch.equal(now[index][name], value) for name, value in state.items())
    assert torch.equal(weights(ours), weights(theirs))
    assert one.state_dict()["state"][0]["step"] == 12 - len(skipped)


def test_states_convert_to_torch_and_back() -> None:
    models = [network() for _ in range(3)]
    ours, torchs, again = (
        kind(model.parameters(), lr=0.01)
        for kind, model in zip((RAdam, torch.optim.RAdam, RAdam), models, strict=True)
    )

    def take(pairs: Any, steps: range) -> None:
        for step in steps:
            for model, optimizer in pairs:
                set_gradients(model, step)
                optimizer.step()

    take([(models[0], ours)], range(8))
    models[1].load_state_dict(models[0].state_dict())
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    take([(models[0], ours), (models[1], torchs)], range(8, 10))
    models[2].load_state_dict(models[1].state_dict())
    again.load_state_dict(copy.deepcopy(torchs.state_dict()))
    take(list(zip(models, (ours, torchs, again), strict=True)), range(10, 12))
    for model in models[1:]:
        torch.testing.assert_close(weights(model), weights(models[0]), rtol=1e-9, atol=1e-11)
    counts = {id(state["step"]) for state in again.state.values()}
    assert len(counts) == 1, "one step count for all weights"


def test_weights_without_a_gradient_have_their_own_count() -> None:
    ours, theirs = network(), network()
    one, other = RAdam(ours.parameters(), lr=0.01), torch.optim.RAdam(theirs.parameters(), lr=0.01)
    for step in range(12):
        for model, optimizer in ((ours, one), (theirs, other)):
            set_gradients(model, step)
            if step in (0, 4, 5):
                next(model.parameters()).grad = None
            optimizer.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)


def test_the_number_of_calls_does_not_grow_with_the_weights() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    optimizer = RAdam(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Waits() as waits:
        optimizer.step()
    assert waits.seen == []
    calls = waits.called
    assert sum(calls.values()) - calls["detach"] - calls["view"] < 80


def test_radam_is_used_where_torch_would_wait() -> None:
    section = TrainorSection(optimizer="RAdam", optim_params={"lr": 1e-3})
    assert type(make_optimizer(nn.Linear(2, 2), section)) is torch.optim.RAdam
    assert type(make_optimizer(nn.Linear(2, 2, device=DEVICE), section)) is RAdam
    own = TrainorSection(optimizer="RAdam", optim_params={"lr": 1e-3, "foreach": False})
    assert type(make_optimizer(nn.Linear(2, 2, device=DEVICE), own)) is torch.optim.RAdam
