from __future__ import annotations

import pytest

from vilmedic.training.health import StuckWarning

HEALTHY = {
    "loss_over_ln_batch": 0.5,
    "feature_std_visual": 0.9,
    "feature_std_linguistic": 0.9,
    "duplicate_reports": 0.0,
}
AT_CHANCE = HEALTHY | {"loss_over_ln_batch": 0.995}


def warnings(numbers: dict[str, float], steps: int = 400, every: int = 10) -> list[tuple[int, str]]:
    watch = StuckWarning(patience=100)
    found = ((step, watch.look(step, numbers)) for step in range(every, steps + 1, every))
    return [(step, text) for step, text in found if text]


def test_a_healthy_run_is_left_alone() -> None:
    assert warnings(HEALTHY) == []
    assert warnings({}) == []


@pytest.mark.parametrize(
    ("numbers", "cause"),
    [
        ({"feature_std_linguistic": 0.02}, "The 'linguistic' features have collapsed"),
        ({"duplicate_reports": 0.6}, "60% of the reports of a batch repeat another"),
        ({}, "Check that line n of the image file and line n of the report file are one sample"),
    ],
)
def test_the_cause_is_named(
    numbers: dict[str, float], cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = warnings(AT_CHANCE | numbers)
    assert cause in found[0][1]
    assert cause in caplog.text
    assert "Nothing was learned in the last 100 steps" in found[0][1]


def test_it_waits_for_its_patience_and_then_twice_as_long() -> None:
    assert [step for step, _ in warnings(AT_CHANCE, steps=700)] == [110, 210, 410]


def test_few_logged_steps_are_no_evidence() -> None:
    assert warnings(AT_CHANCE, steps=400, every=100) == []


def test_a_run_that_gets_going_ends_the_warnings() -> None:
    watch = StuckWarning(patience=100)
    for step in range(10, 120, 10):
        watch.look(step, AT_CHANCE)
    later = [watch.look(step, HEALTHY) for step in range(120, 2000, 10)]
    assert later == [None] * len(later)
