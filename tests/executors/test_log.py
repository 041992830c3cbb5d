from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_pictures_reach_tensorboard(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    log = MetricsLog(tmp_path, seed=1, step=0)
    log.pictures(3, folder)  # nothing was drawn
    folder.mkdir()
    Image.new("L", (4, 2), 128).save(folder / "validate_grid.png")
    log.pictures(7, folder)
    log.close()

    board = EventAccumulator(str(tmp_path / "tensorboard" / "1"))
    board.Reload()
    assert board.Tags()["images"] == ["validate_grid"]
    (event,) = board.Images("validate_grid")
    assert (event.step, event.width, event.height) == (7, 4, 2)
