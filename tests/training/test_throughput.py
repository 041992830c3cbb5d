from __future__ import annotations

import time

import torch

from vilmedic.training.throughput import Throughput


def slow(count: int, seconds: float) -> object:
    for i in range(count):
        time.sleep(seconds)
        yield i


def test_waiting_for_data_is_told_from_computing() -> None:
    meter = Throughput(torch.device("cpu"))
    for _ in meter.waiting_for(slow(3, 0.05)):  # type: ignore[var-annotated, arg-type]
        time.sleep(0.05)
        meter.count(8)

    numbers = meter.numbers()

    assert 0.3 < numbers["data_wait"] < 0.7
    assert 40 < numbers["samples_per_second"] < 24 / 0.3
    assert 0.05 < numbers["memory_gib"] < 64


def test_each_interval_begins_anew() -> None:
    meter = Throughput(torch.device("cpu"))
    meter.count(100)
    meter.numbers()
    assert meter.numbers()["samples_per_second"] == 0
