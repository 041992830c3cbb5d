from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from tests.fake_device import DEVICE, Waits
from vilmedic.training.averaged_weights import AveragedWeights, move_towards

TAKEN = torch.tensor(True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2)
        self.other.weight = self.one.weight
        self.norm = nn.BatchNorm1d(2)


def set_all(model: nn.Module, value: float) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(value)


def test_average_of_a_sequence() -> None:
    model = Tied()
    set_all(model, 1.0)
    average = AveragedWeights(model, 0.5)
    expected = 1.0
    for step, value in enumerate([3.0, 5.0, 2.0], start=1):
        set_all(model, value)
        average.update(step, TAKEN)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    state = average.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in state.items():
        wanted = 2 if name.endswith("num_batches_tracked") else expected
        torch.testing.assert_close(tensor, torch.full_like(tensor, wanted))


def test_frozen_weights_are_distinguished_from_previously_trained_ones() -> None:
    model = Tied()
    model.norm.requires_grad_(False)
    average = AveragedWeights(model, 0.5)
    set_all(model.one, 4.0)
    average.update(1, TAKEN)
    assert average.has_frozen_weights()
    set_all(model.norm, 4.0)
    assert not average.has_frozen_weights()


def test_skipped_step_does_not_update_the_average() -> None:
    model = Tied()
    average = AveragedWeights(model, 0.5)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    set_all(model, 4.0)
    average.update(1, torch.tensor(False))
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, before[name])


def test_weights_are_restored_bit_by_bit() -> None:
    model = Tied()
    average = AveragedWeights(model, 0.9)
    with torch.no_grad():
        model.one.weight.normal_()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mean = {name: value.clone() for name, value in average.state_dict().items()}
    with suppress(RuntimeError), average.in_place():
        assert torch.equal(model.other.weight, mean["one.weight"])
        raise RuntimeError
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
        assert torch.equal(average.state_dict()[name], mean[name]), name


def test_number_of_calls_does_not_grow_with_the_weights() -> None:
    """One call per tensor would be 944 for a ResNet-50 and a BERT."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(60)))
    for device in (torch.device("cpu"), DEVICE):
        model.to(device)
        average = AveragedWeights(model, 0.9)
        taken = torch.ones((), dtype=torch.bool, device=device)
        with Waits() as waits:
            average.update(1, taken)
        calls = {name: n for name, n in waits.called.items() if name != "detach"}
        assert sum(calls.values()) < 20, calls
        assert device.type == "cpu" or waits.seen == []


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_gpu_update_equals_the_cpu_update(share: float) -> None:
    torch.manual_seed(0)
    averages, values = ([torch.randn(3, 2), torch.randn(5)] for _ in range(2))
    expected = [one.lerp(other, share) for one, other in zip(averages, values, strict=True)]
    before = [one.clone() for one in averages]
    move_towards(averages, values, torch.tensor(share))
    for found, wanted, old in zip(averages, expected, before, strict=True):
        torch.testing.assert_close(found, wanted)
        assert share or torch.equal(found, old)
