from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from vilmedic.training.ema import AveragedWeights

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


def test_skipped_step_moves_nothing() -> None:
    model = Tied()
    average = AveragedWeights(model, 0.5)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    set_all(model, 4.0)
    average.update(1, torch.tensor(False))
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, before[name])


def test_weights_come_back_bit_by_bit() -> None:
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
