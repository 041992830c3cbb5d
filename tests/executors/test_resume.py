from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vilmedic.config.sections import TrainorSection
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.executors.checkpoint import save_checkpoint
from vilmedic.executors.resume import find_start, position, tell_changes


def config(run_dir: Path, ckpt: str | None, seed: int | None = None) -> Any:
    return SimpleNamespace(run_dir=run_dir, ckpt=ckpt, trainor=TrainorSection(seed=seed))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Runs of the seeds 4 and 5, the latter newer."""
    for seed in (4, 5):
        state = {"model": {"weight": torch.zeros(1)}, "progress": {}, "seed": seed, "config": {}}
        save_checkpoint(state, tmp_path / f"last_{seed}.pth")
        os.utime(tmp_path / f"last_{seed}.pth", (seed, seed))
    return tmp_path


def test_last_is_the_newest_or_that_of_the_seed(run_dir: Path) -> None:
    assert find_start(config(run_dir, "last")).seed == 5
    assert find_start(config(run_dir, "last", seed=4)).path == run_dir / "last_4.pth"
    with pytest.raises(CheckpointError, match="there is no file 'last'"):
        find_start(config(run_dir, "last", seed=6))


def test_auto_continues_if_there_is_something(run_dir: Path, tmp_path: Path) -> None:
    assert find_start(config(run_dir, "auto")).path == run_dir / "last_5.pth"
    new = find_start(config(run_dir, "auto", seed=6))
    assert (new.seed, new.path) == (6, None)
    assert find_start(config(tmp_path / "empty", "auto", seed=2)).state is None


def test_file_of_another_seed_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"given 9, but .*last_5\.pth continues a run with seed"):
        find_start(config(run_dir, "last_5.pth", seed=9))


def test_weights_alone_cannot_be_continued(tmp_path: Path) -> None:
    save_checkpoint({"model": {"w": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds weights only"):
        find_start(config(tmp_path, "w.pth"))


def test_changes_are_told_by_their_keys(caplog: pytest.LogCaptureFixture) -> None:
    saved = {"name": "a", "trainor": {"epochs": 1, "optim_params": {"lr": 0.1}, "seed": 3}, "x": []}
    now = {"name": "b", "trainor": {"epochs": 2, "optim_params": {}, "ema": 0.9}, "x": []}
    assert tell_changes(saved, now) == [
        "trainor.epochs: 1 -> 2",
        "trainor.optim_params.lr: 0.1 -> (absent)",
        "trainor.ema: (absent) -> 0.9",
    ]
    assert tell_changes(saved, saved) == []


def test_position_is_that_of_the_samples() -> None:
    saved = {"trainor": {"batch_size": 32}}
    assert position(6, saved, 32) == 6
    assert position(6, saved, 64) == 3
    assert position(6, saved, 50) == 3


def test_a_run_killed_before_its_first_save_is_begun_again(tmp_path: Path) -> None:
    for seed in (4, 7, 5):
        (tmp_path / f"config_{seed}.yml").touch()
        os.utime(tmp_path / f"config_{seed}.yml", (seed, seed))
    start = find_start(config(tmp_path, "auto"))
    assert (start.seed, start.path) == (7, None)
    assert find_start(config(tmp_path, "auto", seed=2)).seed == 2
    assert find_start(config(tmp_path, None)).seed not in (4, 5, 7)


def test_a_checkpoint_of_another_directory_joins_no_run_of_its_seed(
    run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    given, other = str(run_dir / "last_4.pth"), tmp_path_factory.mktemp("other")
    assert not find_start(config(run_dir, given)).moved
    assert find_start(config(other, given)).moved
    (other / "last_4.pth").touch()
    with pytest.raises(ConfigError, match="already holds a run with seed 4"):
        find_start(config(other, given))
