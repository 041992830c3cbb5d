from __future__ import annotations

import torch

from vilmedic.training.loss_scale import FIRST_SCALE, STEPS_TO_GROW, LossScale

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def test_halved_on_overflow_and_doubled_after_a_while() -> None:
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


def test_never_below_one() -> None:
    scale = LossScale("fp16", CPU)
    for _ in range(40):
        scale.update(NO)
    assert scale.value == 1
    assert not scale.can_shrink()


def test_other_precisions_are_not_scaled() -> None:
    scale = LossScale("bf16", CPU)
    scale.update(NO)
    loss = torch.tensor(3.0)
    assert scale.scale(loss) is loss
    assert not scale.can_shrink()


def test_state_goes_on() -> None:
    first, second = LossScale("fp16", CPU), LossScale("fp16", CPU)
    first.update(NO)
    for _ in range(STEPS_TO_GROW - 1):
        first.update(YES)
    second.load_state_dict(first.state_dict())
    second.update(YES)
    assert second.value == FIRST_SCALE


def test_a_scale_that_has_fallen_to_one_stays_there() -> None:
    first, second = LossScale("fp16", CPU), LossScale("fp16", CPU)
    for _ in range(20):
        first.update(NO)
    second.load_state_dict(first.state_dict())
    assert second.value == 1
