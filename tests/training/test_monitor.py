from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from vilmedic.log import LOGGER, clock
from vilmedic.training.monitor import RunBars, Throughput


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger=LOGGER.name)


def run(bars: RunBars, steps: int = 3) -> None:
    bars.start_epoch(1, steps + 2, done=2)
    for _ in range(steps):
        bars.step()
        bars.show(loss="0.5", lr="1e-3")
    bars.end_epoch()
    bars.close()


def test_progress_lines_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    run(RunBars(4, every=0.0, terminal=False))

    assert len(caplog.messages) == 3
    assert caplog.messages[0].startswith("Epoch 2 of 4  step 3 of 5  loss 0.5  lr 1e-3  0:00 left")
    assert "step 5 of 5" in caplog.messages[2]


def test_a_short_epoch_adds_no_line(caplog: pytest.LogCaptureFixture) -> None:
    run(RunBars(4, every=30.0, terminal=False))
    assert caplog.messages == []


def test_bars_on_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    run(RunBars(4, every=0.0, terminal=True))

    shown = screen.getvalue()
    assert "Epochs  1 of 4 done" in shown
    assert "Epoch 2 of 4  5/5 " in shown
    assert "left  loss 0.5  lr 1e-3" in shown
    assert "2 of 4" in shown
    assert caplog.messages == []


@pytest.mark.parametrize("terminal", [True, False])
def test_only_the_main_process_shows_anything(
    terminal: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    run(RunBars(4, every=0.0, terminal=terminal))
    assert caplog.messages == []
    assert capsys.readouterr().err == ""


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 3599, 3661, -5)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:01:01",
        "0:00",
    ]


def slow(count: int, seconds: float) -> object:
    for i in range(count):
        time.sleep(seconds)
        yield i


def test_data_waiting_is_separated_from_computing() -> None:
    meter = Throughput(torch.device("cpu"))
    for _ in meter.waiting_for(slow(3, 0.05)):  # type: ignore[var-annotated, arg-type]
        time.sleep(0.05)
        meter.count(8)

    numbers = meter.numbers()

    assert 0.3 < numbers["data_wait"] < 0.7
    assert 40 < numbers["samples_per_second"] < 24 / 0.3
    assert 0.05 < numbers["memory_gib"] < 64


def test_each_interval_starts_from_zero() -> None:
    meter = Throughput(torch.device("cpu"))
    meter.count(100)
    meter.numbers()
    assert meter.numbers()["samples_per_second"] == 0


class Stream:
    """A GPU stream: runs queued work in order, asynchronously to the host."""

    def __init__(self) -> None:
        self.now = 0.0  # host time in seconds
        self.idle_at = 0.0

    def launch(self, seconds: float) -> None:
        self.idle_at = max(self.idle_at, self.now) + seconds


class Event:
    """An event in the queue of the stream; its time is when the stream reaches it."""

    stream: Stream

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: Stream) -> None:
        stream.launch(0.0)
        self.stream, self.time = stream, stream.idle_at

    def query(self) -> bool:
        return self.time <= self.stream.now

    def synchronize(self) -> None:
        self.stream.now = max(self.stream.now, self.time)

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return 1000 * (other.time - self.time)


@pytest.mark.parametrize(
    ("load", "compute", "share"), [(0.2, 1.0, 0.0), (1.0, 1.0, 0.0), (1.5, 1.0, 1 / 3)]
)
def test_gpu_idle_time_counts_not_host_time(
    load: float, compute: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(time, "perf_counter", lambda: stream.now)

    def batches(count: int) -> Iterator[int]:
        for number in range(count):
            stream.now += load
            yield number

    meter = Throughput(torch.device("cuda", 0))
    for interval in range(2):
        meter.restart()
        began = stream.now
        for _ in meter.waiting_for(batches(50)):
            stream.now += 0.01  # a launch takes a moment; then the host continues
            stream.launch(compute)
            meter.count(8)
        stream.now = max(stream.now, stream.idle_at)  # logging the step reads its loss
        numbers = meter.numbers()
        assert numbers["data_wait"] == pytest.approx(share, abs=0.04), interval
        assert numbers["samples_per_second"] == pytest.approx(400 / (stream.now - began), rel=0.01)
        assert numbers["memory_gib"] == 1
