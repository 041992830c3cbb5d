from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from vilmedic.executors.log import MetricsLog


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_hold_no_time_and_timing_does(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, seed=1, step=0)
    log.metrics(1, {"loss": 2.0})
    log.timing(1, {"samples_per_second": 3.5})
    log.close()

    assert read(tmp_path / "metrics.jsonl") == [{"seed": 1, "step": 1, "loss": 2.0}]
    (timing,) = read(tmp_path / "timing.jsonl")
    assert timing["samples_per_second"] == 3.5
    assert timing["time"] > 0
    assert list((tmp_path / "tensorboard" / "1").glob("events*"))


def test_resume_cuts_back_only_its_own_seed(tmp_path: Path) -> None:
    lines = [
        {"seed": 1, "step": 5, "loss": 1.0},
        {"seed": 2, "step": 9, "loss": 2.0},
        {"seed": 1, "step": 6, "loss": 3.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"seed": 1, "st'
    (tmp_path / "metrics.jsonl").write_text(text)

    MetricsLog(tmp_path, seed=1, step=5).close()

    assert read(tmp_path / "metrics.jsonl") == lines[:2]


def test_resume_cuts_the_evaluation_that_comes_after_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, seed=1, step=0)
    log.metrics(3, {"loss": 2.0})
    lines = log.lines
    log.metrics(3, {"epoch": 0, "validation_loss": 1.0})
    log.close()

    again = MetricsLog(tmp_path, seed=1, step=3, lines=lines)
    again.close()
    assert again.lines == lines == 1
    assert read(tmp_path / "metrics.jsonl") == [{"seed": 1, "step": 3, "loss": 2.0}]


def test_lines_wait_for_room_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path, seed=1, step=0)
    log.metrics(1, {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        log.metrics(2, {"loss": 2.0})
        with pytest.raises(OSError, match="too large"):
            log.flush()
        assert len(read(tmp_path / "metrics.jsonl")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.metrics(3, {"loss": 3.0})
    log.flush()
    log.close()

    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert "wait for room" in caplog.text
