"""Kill and resume runs, and compare them with an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.crash.systems import System

ROOT = Path(__file__).parents[2]
SEED = 3
# Processes forked from a server that has loaded the libraries start immediately.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["vilmedic.training.trainor", "vilmedic.evaluation.ensemblor", "torch.utils.tensorboard"]
)


@dataclass
class Killed:
    """Counts of the killed runs of a system.

    Args:
        kills: number of killed processes.
        runs: number of their runs, each resumed to its end.
        while_saving: number of processes killed while writing a checkpoint.
    """

    kills: int = 0
    runs: int = 0
    while_saving: int = 0


def train(arguments: list[str], log: Path) -> None:
    """Run in a child process: the command, with its output in a file."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(ROOT)
    # As in a command: workers are forks of this process and end when it is killed.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    from vilmedic.cli import train as command

    sys.exit(command(arguments))


def start(system: System, data: Path, ckpt_dir: Path, *more: str) -> Any:
    """Start a process that trains a system, or resumes it."""
    name = "run"
    (ckpt_dir / name).mkdir(parents=True, exist_ok=True)
    words = [*system.arguments(data), f"ckpt_dir={ckpt_dir}", f"name={name}", "ckpt=auto", *more]
    process = PROCESSES.Process(target=train, args=(words, ckpt_dir / "output.txt"))
    process.start()
    return process


def finish(process: Any, ckpt_dir: Path, status: int = 0) -> None:
    """Wait for a process and check its exit status."""
    process.join(200)
    assert process.exitcode == status, (
        f"exit status {process.exitcode}\n{(ckpt_dir / 'output.txt').read_text()}"
    )


def reference(system: System, data: Path, ckpt_dir: Path, *more: str) -> float:
    """Train without interruption; return the seconds."""
    began = time.monotonic()
    finish(start(system, data, ckpt_dir, "trainor.num_workers=0", *more), ckpt_dir)
    return time.monotonic() - began


def kill_at_random(system: System, data: Path, base: Path, kills: int, seed: int) -> Killed:
    """Kill a system's process at random moments and resume it until it completes.

    Three in ten kills wait until a checkpoint is being written, because random moments would
    rarely hit such short times. If a run completes before enough processes were killed, another
    one follows. Each completed run is compared with the uninterrupted one. The number of workers
    changes with each start.

    Args:
        system: the system to train.
        data: the data set.
        base: an empty folder.
        kills: number of processes to kill.
        seed: seed of the moments and numbers of workers.

    Raises:
        AssertionError: a run differs.
    """
    draws = random.Random(seed)
    seconds = reference(system, data, base / "whole")
    result = Killed()
    while result.kills < kills:
        ckpt_dir = base / f"killed{result.runs}"
        killed = 0
        while result.kills < kills:
            workers = draws.choice([0, 0, 1, 2])
            process = start(system, data, ckpt_dir, f"trainor.num_workers={workers}")
            process.join(draws.uniform(0, seconds))
            if draws.random() < 0.3:
                _wait_for_save(process, ckpt_dir / "run")
            process.kill()
            process.join()
            if process.exitcode == 0:  # it completed before the kill
                break
            assert process.exitcode == -signal.SIGKILL, (
                f"exit status {process.exitcode}\n{(ckpt_dir / 'output.txt').read_text()}"
            )
            killed += 1
            result.kills += 1
            result.while_saving += any((ckpt_dir / "run").glob(".*.tmp"))
        if not killed:
            shutil.rmtree(ckpt_dir)
            continue
        finish(start(system, data, ckpt_dir, "trainor.num_workers=0"), ckpt_dir)
        assert_same_runs(ckpt_dir / "run", base / "whole" / "run")
        result.runs += 1
        shutil.rmtree(ckpt_dir)
    return result


def _wait_for_save(process: Any, run_dir: Path) -> None:
    """Wait until a checkpoint is being written, or the process has ended."""
    while process.exitcode is None and not any(run_dir.glob(".*.tmp")):
        time.sleep(0.0005)


def assert_same_runs(given: Path, expected: Path, *, same_saves: bool = True) -> None:
    """Last and previous state, best checkpoints and metrics are equal bit by bit.

    Args:
        given: the directory of a resumed run.
        expected: the directory of the uninterrupted run.
        same_saves: whether both were saved at the same steps. A run ended by a signal has one
            save more, so its previous state may differ.
    """
    names = sorted(path.name for path in expected.glob("*.pth"))
    assert sorted(path.name for path in given.glob("*.pth")) == names
    assert (given / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    assert not list(given.glob(".*.tmp"))
    assert {f"last_{SEED}.pth", f"previous_{SEED}.pth"} < set(names)
    for name in names:
        if name.startswith("previous_") and not same_saves:
            continue
        states = [torch.load(folder / name, weights_only=True) for folder in (given, expected)]
        for state in states:
            del state["config"]  # has the run's folder and number of workers
        different = list(_differences(*states, name))
        assert not different, f"differ: {', '.join(different[:5])}"


def _differences(given: Any, expected: Any, where: str) -> Iterator[str]:
    if isinstance(expected, torch.Tensor):
        if not (isinstance(given, torch.Tensor) and torch.equal(given, expected)):
            yield where
    elif isinstance(expected, dict):
        if given.keys() != expected.keys():
            yield where
        else:
            for key, value in expected.items():
                yield from _differences(given[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        if len(given) != len(expected):
            yield where
        else:
            for i, (one, other) in enumerate(zip(given, expected, strict=True)):
                yield from _differences(one, other, f"{where}.{i}")
    elif given != expected:
        yield where
