"""Apple GPUs (MPS), tested without one: checks the calls to torch, not their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from vilmedic import cli
from vilmedic.config.sections import TrainorSection
from vilmedic.device import (
    autocast,
    block_numbers,
    device_states,
    move,
    pick_device,
    pick_precision,
    random_state,
    random_state_kept,
    restore_device_states,
    restore_random_state,
    uses_tf32,
    widest_float,
)
from vilmedic.errors import ConfigError
from vilmedic.training.parallel import prepare_network

ROOT = Path(__file__).parents[1]
MPS = torch.device("mps")


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make torch report an Apple GPU; returns the state of its generator."""
    generator: dict[str, Any] = {"state": torch.tensor([7], dtype=torch.uint8)}

    def restore(state: torch.Tensor) -> None:
        generator["state"] = state

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: generator["state"].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", restore)
    return generator


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an Apple GPU")
def test_mps_without_an_apple_gpu_is_an_error() -> None:
    with pytest.raises(ConfigError, match="given 'mps', but torch finds no Apple GPU"):
        pick_device("mps")
    assert "mps" not in random_state()


def test_mps_is_used_only_when_configured(
    apple: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pick_device("mps") == MPS
    assert pick_device(None).type != "mps"
    with pytest.raises(ConfigError, match="allowed: cpu, cuda, cuda:N, mps or null"):
        pick_device("mps:0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="cannot be shared by several processes"):
        pick_device("mps")


@pytest.mark.parametrize("section", ["trainor", "ensemblor"])
def test_a_configuration_can_select_mps(
    section: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    config = "config/phantom/convirt.yml"
    assert cli.train([config, f"{section}.device=mps", "--check"]) == 0
    assert cli.train([config, f"{section}.device=mp", "--check"]) == 2
    assert "mps" in capsys.readouterr().err


def test_precision_defaults_to_float32() -> None:
    assert pick_precision("auto", MPS) == "fp32"
    assert not uses_tf32(MPS, True)
    assert widest_float(MPS) is torch.float32
    assert widest_float(torch.device("cpu")) is torch.float64
    assert widest_float(torch.device("cuda")) is torch.float64
    assert block_numbers(MPS, 5) > 5
    with mock.patch("torch.autocast") as opened:
        autocast(MPS, "bf16")
        autocast(MPS, "fp16")
        autocast(MPS, "fp32")
    assert opened.call_args_list == [
        mock.call("mps", dtype=torch.bfloat16),
        mock.call("mps", dtype=torch.float16),
    ]


@pytest.mark.parametrize(("device", "queued"), [(MPS, False), (torch.device("cuda"), True)])
def test_non_blocking_copies_need_pinned_memory(device: torch.device, queued: bool) -> None:
    with mock.patch.object(torch.Tensor, "to") as to:
        moved = move({"images": torch.ones(2), "names": ["a"]}, device)
    to.assert_called_once_with(device, non_blocking=queued)
    assert moved["names"] == ["a"]


def test_checkpoints_hold_the_mps_generator_state(apple: dict[str, Any], tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pth")
    apple["state"] = torch.tensor([9], dtype=torch.uint8)
    restore_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert apple["state"].tolist() == [7]


def test_a_state_without_mps_is_restored(apple: dict[str, Any]) -> None:
    state = random_state()
    del state["mps"]  # a run that began on a CPU
    apple["state"] = torch.tensor([9], dtype=torch.uint8)
    restore_random_state(state)
    assert apple["state"].tolist() == [9]


def test_mps_random_state_is_restored_after_use(apple: dict[str, Any]) -> None:
    with random_state_kept(MPS):
        apple["state"] = torch.tensor([9], dtype=torch.uint8)
    assert apple["state"].tolist() == [7]
    states = device_states({MPS, torch.device("cpu")})
    apple["state"] = torch.tensor([9], dtype=torch.uint8)
    restore_device_states(states)
    assert apple["state"].tolist() == [7]


def test_cpu_random_state_is_restored_as_well() -> None:
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    with random_state_kept(torch.device("cpu")):
        torch.rand(5)
    assert torch.equal(torch.rand(()), expected)


def test_unsupported_features_on_mps_are_refused() -> None:
    section = TrainorSection(activation_checkpointing=True)
    with pytest.raises(ConfigError, match="activation_checkpointing: torch cannot repeat"):
        prepare_network(mock.Mock(), section, MPS)
