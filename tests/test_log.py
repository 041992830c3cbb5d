from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from vilmedic import log
from vilmedic.log import LOGGER, Progress, counted, progress, wrapped


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO", logger=LOGGER.name)
    monkeypatch.setattr(LOGGER, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(log, "FIRST", 0.02)
    monkeypatch.setattr(log, "EVERY", 0.02)


def test_wrapping_keeps_numbers_with_their_names() -> None:
    line = "12:00:00  Epoch 1  train_loss 2.8  validation_loss 3.0  validation_auroc 0.4"
    assert wrapped(line, 50) == [
        "12:00:00  Epoch 1  train_loss 2.8",
        "          validation_loss 3.0",
        "          validation_auroc 0.4",
    ]
    assert wrapped(line, 80) == [line]
    long = (
        "12:00:00  a sentence that is longer than the screen is wide, /and/a/path-that-stays-whole"
    )
    assert wrapped(long, 40) == [
        "12:00:00  a sentence that is longer than",
        "          the screen is wide,",
        "          /and/a/path-that-stays-whole",
    ]


def test_lines_are_wrapped_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("x", 20, "", 0, "one  " + "word " * 20, None, None)
    line = log._Line("%(message)s")
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "\n" not in line.format(record)
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, line.format(record).splitlines())) <= 50


def test_long_steps_log_progress_without_a_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Progress("Measuring", terminal=False), Progress("Inside", 4, "parts", terminal=False) as b:
        b.update(2)
        time.sleep(0.2)
    assert caplog.messages
    assert all(line == "Inside  2 of 4 parts  0:00 left" for line in caplog.messages)
    told = len(caplog.messages)
    with Progress("UMAP", terminal=False):
        time.sleep(0.2)
    assert set(caplog.messages[told:]) == {"UMAP  0:00 so far"}
    assert not Progress._open


def test_quick_steps_and_other_ranks_log_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "FIRST", 60.0)
    assert list(progress([1, 2], "Quick", "parts")) == [1, 2]
    monkeypatch.setattr(log, "FIRST", 0.01)
    monkeypatch.setenv("RANK", "1")
    for _ in progress([1], "Slow", "parts"):
        time.sleep(0.1)
    assert caplog.messages == []


def test_a_terminal_shows_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("Caching", 3, "images", terminal=True) as bar:
        assert bar._bar is not None
        bar._bar.delay = 0
        bar.update(3)
        bar._bar.refresh()
    assert "Caching  3 of 3 images" in screen.getvalue()


def test_counted_uses_singular_for_one() -> None:
    assert [counted(number, "epoch") for number in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
    assert [counted(number, "file is", "files are") for number in (1, 1234)] == [
        "1 file is",
        "1,234 files are",
    ]
