from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from tests.fake_device import DEVICE, fake_device
from tests.small_models import tiny_convirt, tiny_encoder
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import ConfigError
from vilmedic.training.optimization import (
    Schedule,
    common_rate,
    described_groups,
    make_optimizer,
    restore_optimizer,
    schedule_options,
    skips_by_itself,
    start_momentum,
)


def make(lr: float = 1.0, total_steps: int = 10, better: str = "lower", **keys: object) -> tuple:
    section = TrainorSection(optimizer="SGD", optim_params={"lr": lr}, **keys)
    optimizer = make_optimizer(nn.Linear(2, 2), section)
    return optimizer, Schedule(optimizer, section, total_steps, better=better)


def rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def test_cosine_steps_with_the_optimizer_and_spans_the_run() -> None:
    optimizer, schedule = make(lr_decay="CosineAnnealingLR", total_steps=10)
    for step in range(1, 11):
        optimizer.step()
        schedule.after_step()
        schedule.after_epoch()
        schedule.after_evaluation(1.0)
        assert rate(optimizer) == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 10)))


def test_plateau_follows_the_direction_of_its_metric() -> None:
    keys = {"lr_decay": "ReduceLROnPlateau", "lr_decay_params": {"factor": 0.5, "patience": 0}}
    for better, worse in (("lower", 2.0), ("higher", 0.5)):
        optimizer, schedule = make(better=better, **keys)
        schedule.after_evaluation(1.0)
        schedule.after_step()
        schedule.after_epoch()
        assert rate(optimizer) == 1.0
        schedule.after_evaluation(worse)
        assert rate(optimizer) == 0.5


def test_step_decay_counts_epochs() -> None:
    optimizer, schedule = make(lr_decay="StepLR", lr_decay_params={"step_size": 1, "gamma": 0.1})
    optimizer.step()
    schedule.after_step()
    assert rate(optimizer) == 1.0
    schedule.after_epoch()
    assert rate(optimizer) == pytest.approx(0.1)


def test_schedule_state_is_restored() -> None:
    keys = {"lr_decay": "ReduceLROnPlateau", "lr_decay_params": {"factor": 0.5, "patience": 1}}
    _, first = make(**keys)
    first.after_evaluation(1.0)
    first.after_evaluation(2.0)
    optimizer, second = make(**keys)
    second.load_state_dict(first.state_dict())
    second.after_evaluation(2.0)
    assert rate(optimizer) == 0.5


def test_refused_options_name_their_section() -> None:
    with pytest.raises(ConfigError, match=r"trainor\.lr_decay_params \(StepLR\)"):
        make(lr_decay="StepLR", lr_decay_params={"step": 3})
    with pytest.raises(ConfigError, match=r"trainor\.lr_decay_params \(OneCycleLR\)"):
        make(lr_decay="OneCycleLR", lr_decay_params={"max_lr": 1.0, "pct_start": "long"})
    with pytest.raises(ConfigError, match=r"trainor\.optim_params \(SGD\)"):
        make(lr=-1.0)


def test_a_run_too_short_for_its_schedule_is_refused() -> None:
    options = {"max_lr": 1.0, "pct_start": 1.0, "total_steps": 1}
    with pytest.raises(ConfigError, match=r"\(OneCycleLR\): the run has \d+ steps, too few"):
        make(lr_decay="OneCycleLR", lr_decay_params=options)


def test_one_cycle_takes_a_run_of_exactly_one_warmup_step() -> None:
    found = []
    for share in (0.1, 0.1001):  # 10 steps: torch divides by a warm-up of 10 * 0.1 - 1
        options = {"max_lr": 1.0, "pct_start": share}
        optimizer, schedule = make(lr_decay="OneCycleLR", lr_decay_params=options)
        rates = []
        for _ in range(10):
            rates.append(rate(optimizer))
            optimizer.step()
            schedule.after_step()
        found.append(rates)
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0][0] == pytest.approx(1 / 25)
    assert max(found[0][1:]) == found[0][1] > 0.95


@pytest.mark.parametrize(
    ("lr_decay", "options", "problem"),
    [
        ("OneCycleLR", {"total_steps": 20}, "ends after 20 steps, but the run has 100. Leave"),
        ("OneCycleLR", {"epochs": 3, "steps_per_epoch": 30}, "ends after 90 steps, but the run"),
        ("PolynomialLR", {}, r"is 0 after 5 of the 100 steps.*total_iters=100\."),
        ("PolynomialLR", {"total_iters": 99}, "is 0 after 99 of the 100 steps"),
        ("LinearLR", {"end_factor": 0}, "is 0 after 5 of the 100 steps"),
    ],
)
def test_a_schedule_that_ends_before_the_run_is_refused(
    lr_decay: str, options: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make(total_steps=100, lr_decay=lr_decay, lr_decay_params=options)


@pytest.mark.parametrize(
    ("lr_decay", "options"),
    [
        ("OneCycleLR", {}),
        ("OneCycleLR", {"total_steps": 100}),
        ("OneCycleLR", {"epochs": 4, "steps_per_epoch": 30}),
        ("PolynomialLR", {"total_iters": 100}),
        ("LinearLR", {}),
        ("WarmupCosineLR", {}),
        ("ConstantLR", {}),
        ("CosineAnnealingLR", {"T_max": 30}),
        ("CosineAnnealingWarmRestarts", {"T_0": 30}),
        ("CyclicLR", {"base_lr": 0.1}),
    ],
)
def test_a_schedule_that_fits_the_run_steps_to_its_end(
    lr_decay: str, options: dict[str, object]
) -> None:
    optimizer, schedule = make(total_steps=100, lr_decay=lr_decay, lr_decay_params=options)
    rates = []
    for _ in range(100):
        rates.append(rate(optimizer))
        optimizer.step()
        schedule.after_step()
    # a cosine is zero at its turning point and rises again
    assert sum(one > 1e-3 for one in rates) >= 98


@pytest.mark.parametrize(
    ("lr_decay", "options"), [("OneCycleLR", {}), ("CyclicLR", {"base_lr": 0})]
)
def test_the_maximum_rate_is_that_of_the_optimizer(
    lr_decay: str, options: dict[str, object]
) -> None:
    for lr in (1e-3, 1e-6):
        optimizer, schedule = make(
            lr=lr, total_steps=5000, lr_decay=lr_decay, lr_decay_params=options
        )
        rates = []
        for _ in range(4000):
            optimizer.step()
            schedule.after_step()
            rates.append(rate(optimizer))
        assert max(rates) == pytest.approx(lr)


def test_a_changed_rate_scales_a_one_cycle_schedule_on_resume() -> None:
    optimizer, schedule = make(lr=1.0, lr_decay="OneCycleLR")
    section = TrainorSection(optimizer="SGD", optim_params={"lr": 0.5}, lr_decay="OneCycleLR")
    for _ in range(3):
        optimizer.step()
        schedule.after_step()
    other = make_optimizer(nn.Linear(2, 2), section)
    continued = Schedule(other, section, 10, better="lower")
    restore_optimizer(other, optimizer.state_dict(), {"lr": 1.0}, section)
    continued.load_state_dict(schedule.state_dict())
    for _ in range(6):
        assert rate(other) == pytest.approx(rate(optimizer) / 2)
        for one, of in ((schedule, optimizer), (continued, other)):
            of.step()
            one.after_step()


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ({"max_lr": 1.0}, {}, True),  # a run whose configuration named both
        ({}, {}, True),
        ({"max_lr": 2.0}, {}, False),
        ({"pct_start": 0.1}, {}, False),
    ],
)
def test_a_schedule_with_or_without_explicit_rate_is_the_same(
    before: dict[str, float], now: dict[str, float], same: bool
) -> None:
    sections = [
        asdict(
            TrainorSection(optim_params={"lr": 1.0}, lr_decay="OneCycleLR", lr_decay_params=options)
        )
        for options in (before, now)
    ]
    assert (schedule_options(sections[0]) == schedule_options(sections[1])) is same


def test_frozen_model_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        make_optimizer(model, TrainorSection())


def test_longer_run_stretches_its_schedule() -> None:
    keys = {"lr_decay": "OneCycleLR", "lr_decay_params": {"max_lr": 1.0}}
    optimizer, short = make(total_steps=4, **keys)
    for _ in range(4):
        optimizer.step()
        short.after_step()
    other, long = make(total_steps=8, **keys)
    other.load_state_dict(optimizer.state_dict())
    long.load_state_dict(short.state_dict())
    rates = []
    for _ in range(3):
        long.after_step()
        rates.append(rate(other))
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.1


@pytest.mark.parametrize("lr_decay", [None, "CosineAnnealingLR"])
def test_changed_options_take_effect_on_resume(lr_decay: str | None) -> None:
    optimizer, schedule = make(lr=1.0, lr_decay=lr_decay)
    optimizer.step()
    schedule.after_step()
    before = rate(optimizer)

    section = TrainorSection(
        optimizer="SGD", optim_params={"lr": 0.5, "weight_decay": 0.1}, lr_decay=lr_decay
    )
    other = make_optimizer(nn.Linear(2, 2), section)
    continued = Schedule(other, section, 10, better="lower")
    saved = {"lr": 1.0, "weight_decay": 0.0}
    restore_optimizer(other, optimizer.state_dict(), saved, section)
    continued.load_state_dict(schedule.state_dict())

    assert rate(other) == pytest.approx(before / 2)
    assert other.param_groups[0]["weight_decay"] == 0.1
    if lr_decay is not None:
        schedule.after_step()
        continued.after_step()
        assert rate(other) == pytest.approx(rate(optimizer) / 2)


def test_unchanged_options_come_from_the_checkpoint() -> None:
    optimizer, _ = make(lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.3
    section = TrainorSection(optimizer="SGD", optim_params={"lr": 1.0})
    other = make_optimizer(nn.Linear(2, 2), section)
    restore_optimizer(other, optimizer.state_dict(), {"lr": 1.0}, section)
    assert rate(other) == 0.3


def test_kernel_options_are_configurable() -> None:
    section = TrainorSection(optimizer="AdamW", optim_params={"foreach": True})
    assert not make_optimizer(nn.Linear(2, 2), section).param_groups[0]["fused"]
    assert make_optimizer(nn.Linear(2, 2), TrainorSection(optimizer="AdamW")).defaults["fused"]


@pytest.mark.parametrize(
    ("saved", "now", "expected"),
    [
        ({}, {"weight_decay": 0.3}, {"weight_decay": 0.3}),
        (
            {"weight_decay": 0.3, "betas": [0.5, 0.6]},
            {},
            {"weight_decay": 0.01, "betas": [0.9, 0.999]},
        ),
        ({}, {"lr": 2e-3}, {"lr": 2e-3}),
        ({"lr": 0.0}, {"lr": 0.5}, {"lr": 0.5}),
    ],
)
def test_options_added_and_removed_take_effect(
    saved: dict[str, object], now: dict[str, object], expected: dict[str, object]
) -> None:
    model = nn.Linear(2, 2)
    before, after = (
        make_optimizer(model, TrainorSection(optimizer="AdamW", optim_params=options))
        for options in (saved, now)
    )
    section = TrainorSection(optimizer="AdamW", optim_params=now)
    restore_optimizer(after, before.state_dict(), saved, section)
    group = after.param_groups[0]
    given = {key: group[key] for key in expected}
    assert given | {"betas": list(group["betas"])} == {"betas": [0.9, 0.999]} | expected


def test_finished_cosine_rises_again_in_a_longer_run() -> None:
    keys = {"lr_decay": "CosineAnnealingLR"}
    optimizer, short = make(total_steps=4, **keys)
    for _ in range(4):
        optimizer.step()
        short.after_step()
    assert rate(optimizer) == pytest.approx(0)
    other, long = make(total_steps=8, **keys)
    other.load_state_dict(optimizer.state_dict())
    long.load_state_dict(short.state_dict())
    assert rate(other) == pytest.approx(0.5)
    for _ in range(4):
        long.after_step()
    assert rate(other) == pytest.approx(0)


@pytest.mark.parametrize(("warmup", "steps"), [(30, 30), (0.15, 30), (0, 0), (0.0, 0), (1, 1)])
def test_warmup_and_cosine_equal_those_of_transformers(warmup: float, steps: int) -> None:
    keys = {"lr_decay": "WarmupCosineLR", "lr_decay_params": {"warmup": warmup}}
    optimizer, schedule = make(lr=0.3, total_steps=200, **keys)
    peer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.3)
    reference = get_cosine_schedule_with_warmup(peer, steps, 200)
    for step in range(200):
        assert abs(rate(optimizer) - rate(peer)) < 1e-12, step
        optimizer.step()
        schedule.after_step()
        peer.step()
        reference.step()


def test_warmup_and_cosine_with_a_final_rate() -> None:
    options = {"warmup": 2, "end_factor": 0.1}
    optimizer, schedule = make(
        lr=2.0, total_steps=10, lr_decay="WarmupCosineLR", lr_decay_params=options
    )
    rates = []
    for _ in range(11):
        rates.append(rate(optimizer))
        optimizer.step()
        schedule.after_step()
    assert rates[:3] == [0.0, 1.0, 2.0]
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[10] == pytest.approx(0.2)


@pytest.mark.parametrize("warmup", [4, 0.25])
def test_warmup_and_cosine_resume_exactly(warmup: float) -> None:
    keys = {"lr_decay": "WarmupCosineLR", "lr_decay_params": {"warmup": warmup}}
    optimizer, schedule = make(total_steps=16, **keys)
    for stop in (2, 7):
        for _ in range(stop):
            optimizer.step()
            schedule.after_step()
        other, continued = make(total_steps=16, **keys)
        other.load_state_dict(optimizer.state_dict())
        continued.load_state_dict(schedule.state_dict())
        for _ in range(3):
            assert rate(other) == rate(optimizer)
            for one, of in ((schedule, optimizer), (continued, other)):
                of.step()
                one.after_step()


@pytest.mark.parametrize("warmup", [10, 12])
def test_a_warmup_as_long_as_the_run_is_refused(warmup: int) -> None:
    keys = {"lr_decay": "WarmupCosineLR", "lr_decay_params": {"warmup": warmup}}
    with pytest.raises(ConfigError, match=rf"takes {warmup} steps, and the schedule has 10\. Give"):
        make(total_steps=10, **keys)


LAYERS = {"num_hidden_layers": 3}


def grouped(
    groups: dict[str, dict[str, float]], model: nn.Module | None = None, **keys: Any
) -> Any:
    torch.manual_seed(0)
    model = tiny_convirt() if model is None else model
    options = {"lr": 0.5, "weight_decay": 0.3}
    section = TrainorSection(optimizer="AdamW", optim_params=options, optim_groups=groups, **keys)
    return model, make_optimizer(model, section), section


def rates_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_each_part_has_its_rate_and_the_last_matching_entry_wins() -> None:
    groups = {"cnn": {"lr": 0.1}, "encoder": {"weight_decay": 0.2}, "*.bias": {"weight_decay": 0.0}}
    model, optimizer, _ = grouped(groups)
    found = rates_by_name(model, optimizer)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, group in found.items():
        assert group["lr"] == (0.1 if name.startswith("cnn.") else 0.5)
        own = 0.2 if name.startswith("encoder.") else 0.3
        assert group["weight_decay"] == (0.0 if name.endswith(".bias") else own)
    lines = list(described_groups(optimizer))
    weights = sum(p.numel() for n, p in model.cnn.named_parameters() if not n.endswith(".bias"))
    assert f"Rates: cnn, {weights:,} weights at 0.1, weight decay 0.3" in lines
    assert any(line.startswith("Rates: the rest, ") and " at 0.5" in line for line in lines)


def test_layer_decay_lowers_rates_by_layer() -> None:
    groups = {"encoder": {"lr": 0.1, "layer_decay": 0.5}, "cnn": {"layer_decay": 0.75}}
    encoder = tiny_encoder(**LAYERS)
    model = tiny_convirt()
    model.encoder = encoder
    model, optimizer, _ = grouped(groups, model)
    found = rates_by_name(model, optimizer)
    expected = {
        "embeddings": 0.0125,
        "layer.0": 0.025,
        "layer.1": 0.05,
        "layer.2": 0.1,
        "pooler": 0.1,
    }
    for part, rate_of_part in expected.items():
        rates = {
            group["lr"]
            for name, group in found.items()
            if f".{part}." in name and "encoder." in name[:8]
        }
        assert rates == {rate_of_part}, part
    blocks = model.cnn.parameters_by_block()
    for depth, block in enumerate(reversed(blocks)):
        names = {id(p): name for name, p in model.named_parameters()}
        assert {found[names[id(p)]]["lr"] for p in block} == {0.5 * 0.75**depth}


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ({"cnn.network.layer9": {"lr": 0.1}}, r"cnn\.network\.layer9: no weight that is trained"),
        ({"*.gain": {"lr": 0.1}}, r"\*\.gain: no weight that is trained"),
        ({"projection": {"layer_decay": 0.5}}, r"projection\.layer_decay: there are no layers"),
    ],
)
def test_groups_without_weights_are_refused(groups: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainor\.optim_groups\.{problem}"):
        grouped(groups)


def test_a_schedule_scales_all_groups() -> None:
    keys: dict[str, Any] = {"lr_decay": "WarmupCosineLR"}
    _, optimizer, section = grouped({"cnn": {"lr": 0.05}}, **keys)
    schedule = Schedule(optimizer, section, 20, better="lower")
    for _ in range(12):
        optimizer.step()
        schedule.after_step()
        own = {group["group"]: group["lr"] for group in optimizer.param_groups}
        assert own["cnn"] == pytest.approx(own["the rest"] / 10, rel=1e-12)


@pytest.mark.parametrize("lr_decay", ["CosineAnnealingLR", "CosineAnnealingWarmRestarts"])
def test_a_minimum_rate_above_a_group_rate_is_refused(lr_decay: str) -> None:
    options: dict[str, Any] = {"T_0": 9} if lr_decay.endswith("Restarts") else {}
    for lowest, fits in ((0.05, True), (0.06, False)):
        keys: dict[str, Any] = {"lr_decay": lr_decay}
        keys["lr_decay_params"] = {**options, "eta_min": lowest}
        _, optimizer, section = grouped({"cnn": {"lr": 0.05}}, **keys)
        if fits:
            Schedule(optimizer, section, 20, better="lower")
            continue
        problem = r"eta_min .*: given 0\.06, to which the rate of cnn, 0\.05, would rise\. Allowed:"
        with pytest.raises(ConfigError, match=problem):
            Schedule(optimizer, section, 20, better="lower")


def test_the_logged_rate_is_that_of_ungrouped_weights() -> None:
    keys: dict[str, Any] = {"lr_decay": "WarmupCosineLR"}
    for groups in ({"cnn": {"lr": 0.05}}, {"*": {"lr": 0.05}}):
        _, optimizer, section = grouped(groups, **keys)
        schedule = Schedule(optimizer, section, 20, better="lower")
        for _ in range(2):
            optimizer.step()
            schedule.after_step()
        assert common_rate(optimizer) == pytest.approx(0.5, rel=1e-12)  # the end of the warm-up


def test_groups_resume_bit_by_bit_and_keep_their_own_decay() -> None:
    groups = {"cnn": {"lr": 0.05, "weight_decay": 0.1}}
    model, optimizer, section = grouped(groups)
    set_gradients(model, 0.1)
    optimizer.step()
    _, other, _ = grouped(groups, copy.deepcopy(model))
    now = replace(section, optim_params={"lr": 0.5, "weight_decay": 0.4})
    restore_optimizer(other, optimizer.state_dict(), section.optim_params, now)
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.4]
    for one, same in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)


def momentum(model: nn.Module, **options: float) -> torch.optim.Optimizer:
    params = {"lr": 0.1, "momentum": 0.9, **options}
    return make_optimizer(model, TrainorSection(optimizer="SGD", optim_params=params))


def set_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 0.1}])
def test_a_skipped_update_does_not_touch_momentum(
    options: dict[str, float],
) -> None:
    """Also the first one, after which torch would use uninitialised memory as momentum."""
    model = nn.Linear(3, 2)
    peer = copy.deepcopy(model)
    one, other = momentum(model, **options), momentum(peer, **options)
    for number, value in enumerate([math.nan, 1.0, 0.5, math.inf, 2.0]):
        set_gradients(model, value)
        start_momentum(one)
        one.found_inf = torch.tensor(float(not math.isfinite(value)))  # type: ignore[attr-defined]
        one.step()
        if math.isfinite(value):
            set_gradients(peer, value)
            other.step()
        for mine, its in zip(model.parameters(), peer.parameters(), strict=True):
            assert torch.equal(mine, its), number
    for mine, its in zip(model.parameters(), peer.parameters(), strict=True):
        assert torch.equal(one.state[mine]["momentum_buffer"], other.state[its]["momentum_buffer"])


def test_momentum_starts_with_the_first_gradient() -> None:
    model = nn.Linear(3, 2)
    optimizer = momentum(model)
    model.weight.grad = torch.ones_like(model.weight)
    start_momentum(optimizer)
    assert list(optimizer.state) == [model.weight]


@pytest.mark.parametrize(
    ("optimizer", "options", "on_cpu", "elsewhere"),
    [
        ("AdamW", {}, True, True),
        ("SGD", {}, True, True),
        ("SGD", {"momentum": 0.9}, False, True),
        ("SGD", {"momentum": 0.9, "dampening": 0.1}, False, False),
        ("RAdam", {}, False, True),
        ("LARS", {}, False, True),
        ("RMSprop", {}, False, False),
        ("AdamW", {"foreach": True}, False, False),
    ],
)
def test_optimizers_that_skip_steps_themselves(
    optimizer: str, options: dict[str, float], on_cpu: bool, elsewhere: bool
) -> None:
    section = TrainorSection(optimizer=optimizer, optim_params={"lr": 0.1, **options})
    with fake_device():
        for device, expected in ((torch.device("cpu"), on_cpu), (DEVICE, elsewhere)):
            found = make_optimizer(nn.Linear(2, 2, device=device), section)
            assert skips_by_itself(found, device) is expected
