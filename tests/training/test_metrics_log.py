from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from tests.full_disk import no_file_beyond
from vilmedic.checkpoints.left_out import read_entries
from vilmedic.errors import DataError
from vilmedic.loggers.contract import Logger, Run
from vilmedic.training.metrics_log import MetricsLog


class Recorder(Logger):
    """Records what it is given, and fails from a given step on."""

    def __init__(self, fails_at: int = 99) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.figures: list[tuple[int, str]] = []
        self.fails_at = fails_at
        self.closed = False

    def open(self, run: Run) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step >= self.fails_at:
            raise ConnectionError("the server is gone")
        self.seen.append((step, values))

    def figure(self, step: int, path: Path) -> None:
        self.figures.append((step, path.name))

    def close(self) -> None:
        self.closed = True


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_the_timing_log_has_times(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, seed=1, step=0)
    log.metrics(1, {"loss": 2.0})
    log.timing(1, {"samples_per_second": 3.5})
    log.close()

    assert read(tmp_path / "metrics.jsonl") == [{"seed": 1, "step": 1, "loss": 2.0}]
    (timing,) = read(tmp_path / "timing.jsonl")
    assert timing["samples_per_second"] == 3.5
    assert timing["time"] > 0


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


def test_validation_lines_after_the_checkpoint_are_cut_as_well(tmp_path: Path) -> None:
    lines = [{"seed": 1, "step": 5, "loss": 1.0}, {"seed": 1, "step": 5, "train_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))

    log = MetricsLog(tmp_path, seed=1, step=5, lines=1)

    assert read(tmp_path / "metrics.jsonl") == lines[:1]
    assert log.lines == 1


def test_loggers_get_numbers_without_epoch_and_time(tmp_path: Path) -> None:
    recorder = Recorder()
    log = MetricsLog(tmp_path, seed=1, step=0, loggers=[("recorder", recorder)])
    log.metrics(1, {"epoch": 0, "loss": 2, "note": "x"})
    log.timing(1, {"data_wait": 0.5})
    log.close()

    assert recorder.seen == [(1, {"loss": 2.0}), (1, {"data_wait": 0.5})]
    assert recorder.closed


def test_loggers_get_the_figures_of_a_folder(tmp_path: Path) -> None:
    recorder = Recorder()
    log = MetricsLog(tmp_path, seed=1, step=0, loggers=[("recorder", recorder)])
    folder = tmp_path / "pictures"
    log.figures(3, folder)  # nothing was drawn
    folder.mkdir()
    for name in ("validate_grid.png", "validate_grid.json"):
        (folder / name).touch()
    log.figures(7, folder)

    assert recorder.figures == [(7, "validate_grid.png")]


def test_a_failing_logger_is_disabled_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = Recorder(), Recorder(fails_at=2)
    log = MetricsLog(tmp_path, seed=1, step=0, loggers=[("bad", bad), ("good", good)])
    for step in (1, 2, 3):
        log.metrics(step, {"loss": 1.0})

    assert [step for step, _ in good.seen] == [1, 2, 3]
    assert [step for step, _ in bad.seen] == [1]
    assert caplog.text.count("logger bad is left out from here on: the server is gone") == 1
    assert len(read(tmp_path / "metrics.jsonl")) == 3


def test_reading_skips_invalid_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_entries(path) == []
    path.write_text('{"seed": 1, "step": 2}\n[1]\n{"step": 3}\nnonsense\n{"seed"')
    assert [entry for _, entry in read_entries(path)] == [{"seed": 1, "step": 2}, *[None] * 4]


def test_lines_are_kept_until_the_disk_has_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path, seed=1, step=0)
    log.metrics(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with no_file_beyond(size + 10):
        log.metrics(2, {"loss": 2.0})
        with pytest.raises(OSError, match="too large"):
            log.flush()
    assert len(read(tmp_path / "metrics.jsonl")) == 1
    log.metrics(3, {"loss": 3.0})
    log.flush()
    log.close()

    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert "wait for disk space" in caplog.text


def test_full_disk_cuts_back_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"seed": 1, "step": step, "loss": 1.0} for step in (4, 5, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    log = MetricsLog(tmp_path, seed=1, step=5)

    assert read(tmp_path / "metrics.jsonl") == lines[:2]
    assert log.lines == 2
    assert {path.name for path in tmp_path.iterdir()} == {".metrics.lock", "metrics.jsonl"}


def test_unreadable_lines_are_moved_to_another_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = b'{"seed": 1, "step": 1, "loss": 2.0}\n{"seed": 2, "step": 9}\n'
    odd = [
        b'\xff\xfe{"seed": 1}\n',
        b'{"seed": 1, "step": "two"}\n{"seed": 1, "step": null}\n{"seed": 1, "step": 1e400}\n',
        b'{"seed": 1, "step": -1}\n{"seed": true, "step": 1}\n{"seed": [], "step": 1}\n',
        b"[" * 100_000 + b"\n" + b'{"seed": 1, "step": ' + b"9" * 5000 + b"}\n",
        b'{"seed": 1, "step": 9999999999999999999999}\n\x00\n',
    ]
    for name in ("metrics", "timing"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(odd) + good)

    log = MetricsLog(tmp_path, seed=1, step=1)
    log.metrics(2, {"loss": 1.0})
    log.flush()

    assert [(one["seed"], one["step"]) for one in read(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 9),
        (1, 2),
    ]
    assert caplog.text.count("11 lines cannot be read") == 2
    assert (tmp_path / "set_aside" / "metrics.jsonl").read_bytes() == b"".join(odd) + good


def test_a_line_truncated_by_a_crash_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"seed": 1, "step": 1}\n{"seed": 1, "st')
    MetricsLog(tmp_path, seed=1, step=1)
    assert read(tmp_path / "metrics.jsonl") == [{"seed": 1, "step": 1}]
    assert not (tmp_path / "set_aside").exists()


@pytest.mark.parametrize("name", ["metrics", "timing"])
def test_a_folder_or_pipe_instead_of_the_log_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.mkdir()
    with pytest.raises(DataError, match=rf"{name}\.jsonl: is a folder"):
        MetricsLog(tmp_path, seed=1, step=1)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(DataError, match=rf"{name}\.jsonl: is a named pipe"):
        MetricsLog(tmp_path, seed=1, step=1)


def append_lines(run_dir: Path, seed: int, barrier: Any) -> None:
    log = MetricsLog(run_dir, seed=seed, step=0)
    barrier.wait()
    for step in range(1, 41):
        log.metrics(step, {"loss": 1.0})
        if step % 10 == 0:  # as a resumed run does
            MetricsLog(run_dir, seed=seed, step=step)


def test_concurrent_seeds_lose_no_lines(tmp_path: Path) -> None:
    """One process cuts its lines back by replacing the file while the others append."""
    context = multiprocessing.get_context("fork")
    (tmp_path / "metrics.jsonl").write_text('{"seed": 0, "step": 99}\n')
    barrier = context.Barrier(3)
    processes = [
        context.Process(target=append_lines, args=(tmp_path, seed, barrier)) for seed in (1, 2, 3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = [(line["seed"], line["step"]) for line in read(tmp_path / "metrics.jsonl")]
    assert sorted(found) == [(0, 99), *((seed, n) for seed in (1, 2, 3) for n in range(1, 41))]
