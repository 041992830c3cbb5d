from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.optim.lars import Lars
from torch import nn

from tests.fake_device import DEVICE, Waits
from tests.training.test_radam import set_gradients, weights
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import ConfigError
from vilmedic.training.lars import LARS
from vilmedic.training.optimization import make_optimizer

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "momentum": 0.5},
    {"weight_decay": 0.0, "momentum": 0.0},
    {"nesterov": True, "trust_coefficient": 0.02, "eps": 1e-3},
]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    return layers.double().to(memory_format=torch.channels_last)


def timms(model: nn.Module, **options: Any) -> Lars:
    """timm's LARS adapts groups with weight decay, so biases and norms are a group without."""
    ours: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-6, "lr": 0.3, **options}
    ours["trust_coeff"] = ours.pop("trust_coefficient", 0.001)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return Lars(groups, **ours)


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_equal_those_of_timm(options: dict[str, Any]) -> None:
    ours, theirs = network(), network()
    one, other = LARS(ours.parameters(), **options), timms(theirs, **options)
    for step in range(10):
        for model, optimizer in ((ours, one), (theirs, other)):
            set_gradients(model, step)
            if step == 4:  # a layer without a gradient is not adapted
                model[3].weight.grad.zero_()
            optimizer.step()
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)
    assert not torch.allclose(weights(ours), weights(network()), atol=1e-3)


def test_biases_and_norms_neither_decay_nor_adapt() -> None:
    model = network()
    optimizer = LARS(model.parameters(), lr=0.5, momentum=0, weight_decay=10.0)
    set_gradients(model, 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        plain = old - 0.5 * parameter.grad
        assert torch.allclose(parameter, plain) is (parameter.ndim == 1)
        if parameter.ndim > 1:
            slope = parameter.grad + 10 * old
            trust = 0.001 * old.norm() / (parameter.grad.norm() + 10 * old.norm() + 1e-8)
            torch.testing.assert_close(parameter.detach(), old - 0.5 * trust * slope)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("skipped", [(0, 1), (3,)])
def test_a_skipped_step_changes_nothing(options: dict[str, Any], skipped: tuple[int, ...]) -> None:
    ours, theirs = network(), network()
    one, other = LARS(ours.parameters(), **options), LARS(theirs.parameters(), **options)
    for step in range(6):
        set_gradients(ours, step)
        one.found_inf = torch.tensor(float(step in skipped), dtype=torch.float64)
        if step in skipped:
            for parameter in ours.parameters():
                parameter.grad.fill_(torch.nan if step % 2 else torch.inf)
        one.step()
        if step not in skipped:
            set_gradients(theirs, step)
            other.step()
        assert torch.equal(weights(ours), weights(theirs))


def test_lars_does_not_wait_for_the_device() -> None:
    model = network().to(DEVICE)
    optimizer = LARS(model.parameters())
    with Waits() as waits:
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            optimizer.found_inf = torch.zeros((), device=DEVICE)
            optimizer.step()
    assert waits.seen == []


def test_lars_can_be_configured() -> None:
    options: dict[str, Any] = {"lr": 0.6, "weight_decay": 0.1}
    optimizer = make_optimizer(network(), TrainorSection(optimizer="LARS", optim_params=options))
    assert isinstance(optimizer, LARS)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    options = {"nesterov": True, "momentum": 0.0}
    with pytest.raises(ConfigError, match=r"trainor\.optim_params \(LARS\): nesterov looks ahead"):
        make_optimizer(network(), TrainorSection(optimizer="LARS", optim_params=options))
