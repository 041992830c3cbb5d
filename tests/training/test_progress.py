from __future__ import annotations

import math

import pytest
import torch

from vilmedic.training.progress import Progress, Tally
from vilmedic.training.step import StepResult

CPU = torch.device("cpu")


def result(loss: float, *, taken: bool = True, bad: bool = False) -> StepResult:
    values = (torch.tensor(value) for value in (loss, 1.0, taken, bad))
    return StepResult(*values, samples=2, parts={})


def test_mean_is_over_the_steps_that_were_taken() -> None:
    tally = Tally(CPU, Progress().tally)
    assert math.isnan(tally.mean_loss())
    for one in (result(1.0), result(math.nan, taken=False, bad=True), result(4.0)):
        tally.add(one)
    assert tally.mean_loss() == 2.5
    tally.start_epoch()
    assert math.isnan(tally.mean_loss())


def test_bad_steps_in_a_row_are_not_missed_between_two_looks() -> None:
    tally = Tally(CPU, Progress().tally)
    bad, back_off = result(1.0, taken=False, bad=True), result(1.0, taken=False)
    for one in (bad, bad, back_off, bad, result(1.0), bad):
        tally.add(one)
    assert tally.bad_steps() == (4, 3)
    assert tally.bad_steps() == (4, 1)
    tally.add(bad)
    assert tally.bad_steps() == (5, 2)


def test_goes_on_from_what_was_read() -> None:
    first = Tally(CPU, Progress().tally)
    first.add(result(0.1))
    second = Tally(CPU, first.read())
    for tally in (first, second):
        tally.add(result(0.2))
    assert first.read() == second.read()
    assert first.mean_loss() == pytest.approx(0.15)
