from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from vilmedic.config.sections import TrainorSection
from vilmedic.executors.training_step import TrainingStep
from vilmedic.models.contract import Model

CPU = torch.device("cpu")


class Regression(Model):
    """Mean squared error of a linear map with batch statistics that do not enter the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.norm(batch["x"])
        return {"loss": functional.mse_loss(self.linear(batch["x"])[:, 0], batch["y"])}


def make_step(model: Model, **keys: Any) -> TrainingStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainingStep(model, lambda batch: batch, optimizer, TrainorSection(**keys), CPU)


def batches(sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator)
    y = torch.randn(sum(sizes), dtype=torch.float64, generator=generator)
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    return [{"index": torch.arange(len(a)), "x": a, "y": b} for a, b in parts]


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [4, 4, 4, 3], [4, 1]])
def test_accumulated_gradient_is_that_of_one_big_batch(sizes: list[int]) -> None:
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


def test_clipping_limits_the_update_and_reports_the_norm_before() -> None:
    model = Regression()
    before = copy.deepcopy(model)

    result = make_step(model, clip_grad_norm=0.01)(batches([4]))

    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    )
    assert result.grad_norm > 0.01
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_step_that_is_not_a_number_changes_nothing(poison: float) -> None:
    model = Regression()
    before = copy.deepcopy(model.state_dict())
    group = batches([4, 4])
    group[1]["x"][0, 0] = poison

    result = make_step(model)(group)

    assert not result.taken
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, before[name]), name
