"""Runs with a length in steps, and validation within epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.crash.systems import VAE
from tests.end_to_end.conftest import Run
from vilmedic import run
from vilmedic.errors import Interrupted
from vilmedic.phantom.write import Plan, build
from vilmedic.training.trainor import Trainor
from vilmedic.training.validator import Validator


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The small VAE on 9 samples: 3 steps per epoch, 7 in total; validated every 2 steps."""
    root = tmp_path_factory.mktemp("steps") / "data"
    build(root, Plan(train=9, validate=5, test=2, size=32), force=False, workers=1)
    system = [word for word in VAE.arguments(root) if not word.startswith("trainor.epochs")]
    more = ["trainor.num_workers=0", "trainor.save_every=null", "name=run", "ckpt=auto"]
    length = ["trainor.steps=7", "validator.every=2", "trainor.grad_accu=1"]
    schedule = ["trainor.lr_decay=CosineAnnealingLR", "trainor.lr_decay_params={}"]
    return [*system, *more, *length, *schedule]


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_pages", lambda run_dir: None)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in (folder / "run/metrics.jsonl").read_text().splitlines()]


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "run/last_3.pth", weights_only=True)


@pytest.fixture(scope="module")
def whole(run_here: Run, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_pages", lambda run_dir: None)
        run_here("bin/train.py", *arguments, f"ckpt_dir={folder}")
    return folder


def test_validation_runs_every_n_steps_and_at_the_end(whole: Path) -> None:
    evaluations = [one for one in lines(whole) if "validation_loss" in one]
    assert [one["step"] for one in evaluations] == [2, 4, 6, 7]
    assert [one["epoch"] for one in evaluations] == [0, 1, 1, 2]
    losses = {one["step"]: one["loss"] for one in lines(whole) if "loss" in one}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6, 7]
    mean = (losses[3] + losses[4]) / 2
    assert evaluations[1]["train_loss"] == pytest.approx(mean), "since the last evaluation"
    progress = state(whole)["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (7, 2, 1)
    # The cosine schedule spans the run.
    assert state(whole)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)
    kept = sorted(path.name for path in (whole / "run").glob("state_*.pth"))
    assert kept == ["state_6_3.pth", "state_7_3.pth"]


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def compare(whole: Path, folder: Path) -> None:
    ours, theirs = state(folder), state(whole)
    for part in ("model", "ema", "optimizer", "schedule", "progress", "random", "epoch"):
        assert alike(ours[part], theirs[part]), part
    assert lines(folder) == lines(whole)
    names = [
        sorted(path.name for path in (one / "run").glob("[0-9]*.pth")) for one in (folder, whole)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("step", range(1, 8))
def test_a_run_interrupted_after_a_step_resumes_exactly(
    run_here: Run, arguments: list[str], whole: Path, tmp_path: Path, step: int
) -> None:
    told = Trainor._told_to_stop
    words = [*arguments, f"ckpt_dir={tmp_path}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainor, "_told_to_stop", lambda self: self.state.progress.step == step or told(self)
        )
        run_here("bin/train.py", *words, status=143)
    assert state(tmp_path)["progress"]["step"] == step
    run_here("bin/train.py", *words)
    compare(whole, tmp_path)


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_interrupted_during_validation_validates_again(
    run_here: Run, arguments: list[str], whole: Path, tmp_path: Path, number: int
) -> None:
    words = [*arguments, f"ckpt_dir={tmp_path}"]
    score, seen = Validator.score, []

    def stopped(self: Validator, *given: Any) -> dict[str, float]:
        seen.append(1)
        if len(seen) == 2 * number:  # the average is scored as well
            raise Interrupted("SIGTERM", 143)
        return score(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "score", stopped)
        run_here("bin/train.py", *words, status=143)
    run_here("bin/train.py", *words)
    compare(whole, tmp_path)


def test_validation_every_few_epochs(run_here: Run, arguments: list[str], tmp_path: Path) -> None:
    words = [word for word in arguments if not word.startswith(("trainor.steps", "validator.e"))]
    words += ["validator.every=2epochs", "trainor.epochs=3", f"ckpt_dir={tmp_path}"]
    run_here("bin/train.py", *words)
    evaluations = [one for one in lines(tmp_path) if "validation_loss" in one]
    assert [(one["step"], one["epoch"]) for one in evaluations] == [(6, 1), (9, 2)]


def test_steps_and_epochs_exclude_each_other(run_here: Run, arguments: list[str]) -> None:
    done = run_here("bin/train.py", *arguments, "trainor.epochs=3", "--check", status=2)
    assert "trainor.epochs" in done.stderr
    assert "has no effect unless trainor.steps is null" in done.stderr
    done = run_here("bin/train.py", *arguments, "validator.every=2min", "--check", status=2)
    assert "steps (50) or epochs (1epoch, 2epochs)" in done.stderr
