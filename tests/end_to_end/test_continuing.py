"""Runs that go on with another configuration, from an earlier state, or on a full disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.crash.systems import VAE
from tests.disk import no_file_beyond
from tests.end_to_end.conftest import Run
from vilmedic.executors import run
from vilmedic.executors.trainor import Trainor
from vilmedic.phantom.write import Plan, build


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The small VAE on 9 samples: 2 steps an epoch, 3 of batches of 4 without accumulation."""
    root = tmp_path_factory.mktemp("continuing") / "data"
    build(root, Plan(train=9, validate=5, test=2, size=32), force=False, workers=1)
    more = ["trainor.num_workers=0", "trainor.save_every=null", "trainor.ema=null", "name=run"]
    return [*VAE.arguments(root), *more, "trainor.grad_accu=1", "ckpt=auto"]


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_pages", lambda run_dir: None)


def lines(ckpt_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in (ckpt_dir / "run/metrics.jsonl").read_text().splitlines()]


def scored(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[0-9]*.pth"))


@pytest.mark.parametrize(
    "decay",
    [
        ["trainor.lr_decay=CosineAnnealingLR", "trainor.lr_decay_params={}"],
        ["trainor.lr_decay=OneCycleLR", "trainor.lr_decay_params={max_lr: 1e-3, pct_start: 0.3}"],
    ],
    ids=["cosine", "one-cycle"],
)
@pytest.mark.parametrize(
    ("change", "left"),
    [
        ("trainor.batch_size=8", 4),
        ("trainor.batch_size=2", 10),
        ("trainor.grad_accu=2", 4),
        ("trainor.epochs=5", 9),
    ],
)
def test_schedule_ends_with_the_steps_that_are_left(
    run_here: Run, arguments: list[str], tmp_path: Path, decay: list[str], change: str, left: int
) -> None:
    words = [*arguments, f"ckpt_dir={tmp_path}", *decay]
    _stopped_after(2, run_here, [*words, "trainor.epochs=4"])

    run_here("bin/train.py", *words, "trainor.epochs=4", change)

    rates = [one["lr"] for one in lines(tmp_path) if "lr" in one]
    assert len(rates) == 6 + left
    falling = rates[7:]  # the first step may still be at the rate that was saved
    falling = falling[falling.index(max(falling)) :]
    assert falling == sorted(falling, reverse=True)
    state = torch.load(tmp_path / "run/last_3.pth", weights_only=True)
    # The cosine is zero behind the last step, the cycle at it.
    assert min(rates[-1], state["optimizer"]["param_groups"][0]["lr"]) < 1e-6


def _stopped_after(epochs: int, run_here: Run, words: list[str]) -> None:
    """Train as one is interrupted by a signal at the beginning of an epoch."""
    train = Trainor._epoch

    def epoch(self: Trainor, number: int) -> None:
        if number == epochs:
            raise self._stop()
        train(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainor, "_epoch", epoch)
        run_here("bin/train.py", *words, status=143)


def test_another_metric_has_no_best_yet(
    run_here: Run, arguments: list[str], tmp_path: Path
) -> None:
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.ema=0.5"]
    never = "validation_representation_visual_spread"  # a VAE has no such feature
    wrong = ["validator.metrics={representation: null}", f"trainor.early_stop_metric={never}"]
    done = run_here("bin/train.py", *words, "trainor.epochs=2", *wrong, status=2)
    assert f"given '{never}', but an evaluation gives validation_loss" in done.stderr
    assert "go on with ckpt=last" in done.stderr
    run_here("bin/train.py", *words, "trainor.epochs=2")
    before = scored(tmp_path / "run")
    assert [one["epoch"] for one in lines(tmp_path) if "train_loss" in one] == [0, 1]

    other = "trainor.early_stop_metric=ema_validation_loss"
    done = run_here("bin/train.py", *words, "trainor.epochs=3", other)

    assert "early_stop_metric has changed" in done.stdout
    assert scored(tmp_path / "run/set_aside") == before
    score = lines(tmp_path)[-1]["ema_validation_loss"]
    assert scored(tmp_path / "run") == [f"{score!r}_2_3.pth"]
    state = torch.load(tmp_path / "run/last_3.pth", weights_only=True)
    assert (state["metric"], state["better"]) == ("ema_validation_loss", "lower")
    progress = state["progress"]
    assert (progress["best"], progress["stale"]) == (score, 0)


def test_an_earlier_state_does_not_compete_with_what_came_after_it(
    run_here: Run, arguments: list[str], tmp_path: Path
) -> None:
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.keep=1"]
    run_here("bin/train.py", *words, "trainor.epochs=1")
    early = tmp_path / "early.pth"
    shutil.copy(tmp_path / "run/last_3.pth", early)
    shutil.copy(early, tmp_path / "run/early.pth")
    run_here("bin/train.py", *words, "trainor.epochs=4")
    (best,) = scored(tmp_path / "run")
    assert best.endswith("_3_3.pth")

    slower = ["trainor.epochs=2", "trainor.optim_params.lr=1e-6", "trainor.lr_decay=null"]
    run_here("bin/train.py", *words[:-1], "trainor.keep=1", *slower, "ckpt=early.pth")

    assert scored(tmp_path / "run/set_aside") == [best]
    score = lines(tmp_path)[-1]["validation_loss"]
    assert scored(tmp_path / "run") == [f"{score!r}_1_3.pth"]

    done = run_here("bin/train.py", *words, f"ckpt={early}", status=2)
    assert "already holds a run with seed 3" in done.stderr
    run_here("bin/train.py", *words, f"ckpt={early}", "trainor.epochs=2", "name=other")
    assert len(scored(tmp_path / "other")) == 1


def test_a_whole_run_goes_on_without_room(
    run_here: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = ["validator.post_processing=[plot_reconstruction]", "trainor.profile=1"]
    kept = [word for word in arguments if word != "~validator.post_processing"]
    words = [*kept, f"ckpt_dir={tmp_path}", *pictures, "trainor.loggers=[]"]
    run_here("bin/train.py", *words, "trainor.epochs=1")
    before = {
        name: (tmp_path / "run" / name).read_bytes() for name in ("config_3.yml", "last_3.pth")
    }
    make = Path.mkdir

    def no_new_folder(self: Path, *arguments: Any, **options: Any) -> None:
        if not self.exists():
            raise OSError(28, "No space left on device")
        make(self, *arguments, **options)

    with monkeypatch.context() as patch, no_file_beyond(0):
        patch.setattr(Path, "mkdir", no_new_folder)
        done = run_here("bin/train.py", *words, "trainor.epochs=3")

    assert "Finished after 3 epochs" in done.stdout
    assert "training goes on" in done.stdout
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    run_here("bin/train.py", *words, "trainor.epochs=3")
    assert [one["epoch"] for one in lines(tmp_path) if "train_loss" in one] == [0, 1, 2]
