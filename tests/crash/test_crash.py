from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.crash.killing import assert_same_runs, finish, kill_at_random, reference, start
from tests.crash.systems import CONVIRT, SIMCLR
from vilmedic.phantom.write import Plan, build


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("crash") / "data"
    build(root, Plan(train=21, validate=9, test=4, size=32), force=False, workers=1)
    return root


@pytest.mark.slow
def test_killed_runs_equal_the_uninterrupted_run(data: Path, tmp_path: Path) -> None:
    """Three kills of the smallest model; `make test-crash` kills every system more often."""
    done = kill_at_random(SIMCLR, data, tmp_path, kills=3, seed=int.from_bytes(os.urandom(2)))
    assert done.kills == 3
    assert done.runs >= 1


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_the_state_and_set_the_status(data: Path, tmp_path: Path) -> None:
    """SIGTERM, then Ctrl-C: the state is saved within seconds, and the status says so."""
    reference(CONVIRT, data, tmp_path / "whole", "trainor.save_every=null")
    folder = tmp_path / "stopped"
    for step, number, status in ((2, signal.SIGTERM, 143), (5, signal.SIGINT, 130)):
        process = start(CONVIRT, data, folder, "trainor.save_every=null", "trainor.num_workers=1")
        _wait_for_step(process, folder / "run" / "metrics.jsonl", step)
        began = time.monotonic()
        os.kill(process.pid, number)
        finish(process, folder, status)
        assert time.monotonic() - began < 20  # allows for a busy machine; it takes about one
    finish(start(CONVIRT, data, folder, "trainor.save_every=null"), folder)

    assert_same_runs(folder / "run", tmp_path / "whole" / "run")
    output = (folder / "output.txt").read_text()
    assert "interrupted: after step" in output
    assert "last_3.pth holds the state; ckpt=auto continues" in output
    assert "Traceback" not in output


def _wait_for_step(process: object, metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")
