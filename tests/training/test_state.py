from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vilmedic.errors import CheckpointError
from vilmedic.training.resume import Start
from vilmedic.training.state import _alike, _check_optimizer


@pytest.mark.parametrize(
    ("given", "own", "alike"),
    [
        (3, 0.5, True),
        (True, 1, False),
        ("3", 3, False),
        (torch.ones(1), 1.0, False),
        ((0.9, 0.99), [0.5, 0.5], True),
        ((0.9,), (0.5, 0.5), False),
        ({"a": [1]}, {"a": [2.5]}, True),
        ({"a": [1], "b": 1}, {"a": [1], "c": 2}, True),
        ({"a": "x"}, {"a": 1}, False),
        ("anything", None, True),
    ],
)
def test_types_and_lengths_are_compared(given: Any, own: Any, alike: bool) -> None:
    assert _alike(given, own) is alike


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda group, moments: group.update(lr="fast"), "'lr'"),
        (lambda group, moments: group.update(betas=(0.9,)), "'betas'"),
        (lambda group, moments: group.update(amsgrad=True), "'amsgrad'"),
        (lambda group, moments: group.update(max_lr=[0.5]), "'max_lr'"),
        (lambda group, moments: moments.update(step=torch.ones(2)), "step is"),
        (lambda group, moments: moments.update(step="x"), "step is"),
        (lambda group, moments: moments.update(exp_avg=torch.ones(2)), "exp_avg is"),
        (lambda group, moments: moments.update(exp_avg=None), "exp_avg is"),
    ],
)
def test_a_state_that_breaks_the_next_step_is_refused(
    change: Callable[[dict[str, Any], dict[str, Any]], None], named: str
) -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    fresh = [dict(group) for group in optimizer.param_groups]
    start = Start(3, Path("last_3.pth"))
    _check_optimizer(optimizer, fresh, start)
    optimizer.param_groups[0]["max_lr"] = 0.5  # added by a schedule
    _check_optimizer(optimizer, fresh, start)
    change(optimizer.param_groups[0], optimizer.state[layer.weight])
    with pytest.raises(CheckpointError, match=rf"last_3\.pth: .*{named}"):
        _check_optimizer(optimizer, fresh, start)
