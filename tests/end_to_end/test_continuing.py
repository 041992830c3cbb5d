"""Runs that resume with another configuration, from an earlier state, or on a full disk."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.crash.systems import VAE
from tests.end_to_end.conftest import Run
from tests.full_disk import no_file_beyond
from vilmedic import run
from vilmedic.checkpoints.run_directory import RunLock
from vilmedic.datasets import decode
from vilmedic.phantom.write import Plan, build
from vilmedic.training.saver import Saver
from vilmedic.training.trainor import Trainor
from vilmedic.training.validator import Validator


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The small VAE on 9 samples: 2 steps per epoch, 3 with batches of 4 and no accumulation."""
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
def test_schedule_ends_with_the_remaining_steps(
    run_here: Run, arguments: list[str], tmp_path: Path, decay: list[str], change: str, left: int
) -> None:
    words = [*arguments, f"ckpt_dir={tmp_path}", *decay]
    _stopped_after(2, run_here, [*words, "trainor.epochs=4"])

    run_here("bin/train.py", *words, "trainor.epochs=4", change)

    rates = [one["lr"] for one in lines(tmp_path) if "lr" in one]
    assert len(rates) == 6 + left
    falling = rates[7:]  # the first step may still use the saved rate
    falling = falling[falling.index(max(falling)) :]
    assert falling == sorted(falling, reverse=True)
    state = torch.load(tmp_path / "run/last_3.pth", weights_only=True)
    # The cosine is zero after the last step, the cycle at the last step.
    assert min(rates[-1], state["optimizer"]["param_groups"][0]["lr"]) < 1e-6


def _stopped_after(epochs: int, run_here: Run, words: list[str]) -> None:
    """Train until a signal interrupts the run at the start of an epoch."""
    train = Trainor._epoch

    def epoch(self: Trainor, number: int) -> None:
        if number == epochs:
            raise self._stop()
        train(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainor, "_epoch", epoch)
        run_here("bin/train.py", *words, status=143)


def test_a_resumed_run_keeps_its_precision(
    run_here: Run, arguments: list[str], tmp_path: Path
) -> None:
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.precision=auto"]
    path, written = tmp_path / "run/last_3.pth", tmp_path / "run/config_3.yml"
    done = run_here("bin/train.py", *words, "trainor.epochs=1")
    state = torch.load(path, weights_only=True)
    assert state["config"]["trainor"]["precision"] == "fp32"
    assert "\n  precision: fp32\n" in written.read_text()
    assert "on cpu, fp32: 9 training samples" in done.stdout
    assert json.loads((tmp_path / "run/environment_3.json").read_text())["tf32"] is False

    state["config"]["trainor"]["precision"] = "bf16"  # as if it had run on a GPU until here
    torch.save(state, path)
    done = run_here("bin/train.py", *words, "trainor.epochs=2")
    assert "\n  precision: bf16\n" in written.read_text()
    assert torch.load(path, weights_only=True)["config"]["trainor"]["precision"] == "bf16"
    assert "trainor.precision" not in done.stdout


def test_a_new_early_stop_metric_has_no_best_score_yet(
    run_here: Run, arguments: list[str], tmp_path: Path
) -> None:
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.ema=0.5"]
    never = "validation_representation_visual_spread"  # a VAE has no such feature
    wrong = ["validator.metrics={representation: null}", f"trainor.early_stop_metric={never}"]
    done = run_here("bin/train.py", *words, "trainor.epochs=2", *wrong, status=2)
    assert f"given '{never}', but an evaluation gives validation_loss" in done.stderr
    assert "holds the epoch: ckpt=auto continues." in done.stderr
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


def test_resuming_an_earlier_state_sets_later_checkpoints_aside(
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


def test_an_earlier_epoch_is_resumed_from_its_kept_state(
    run_here: Run, arguments: list[str], tmp_path: Path
) -> None:
    words = [*arguments[:-1], f"ckpt_dir={tmp_path}", "trainor.lr_decay=null"]
    whole = [*words, "trainor.epochs=3", "trainor.keep_states=2"]
    run_here("bin/train.py", *whole)
    run_dir = tmp_path / "run"
    assert sorted(path.name for path in run_dir.glob("state_*.pth")) == [
        "state_6_3.pth",
        "state_9_3.pth",
    ]
    best = scored(run_dir)
    kept = {path.name: torch.load(path, weights_only=True) for path in run_dir.glob("*_3.pth")}
    assert "optimizer" not in kept[best[0]]
    assert "optimizer" in kept["state_6_3.pth"]

    done = run_here("bin/train.py", *whole, f"ckpt={best[0]}", status=2)
    assert f"{run_dir / best[0]}: holds weights only, so training cannot continue" in done.stderr
    assert "ckpt=auto" in done.stderr
    run_here("bin/train.py", *whole, "ckpt=state_6_3.pth")

    assert scored(run_dir) == best
    assert (run_dir / "set_aside/state_9_3.pth").exists()
    again = torch.load(run_dir / "state_9_3.pth", weights_only=True)
    before = kept["state_9_3.pth"]
    assert all(torch.equal(value, before["model"][name]) for name, value in again["model"].items())
    assert [one["epoch"] for one in lines(tmp_path) if "train_loss" in one] == [0, 1, 2]


def test_a_best_checkpoint_of_earlier_versions_is_resumed(
    run_here: Run, arguments: list[str], tmp_path: Path
) -> None:
    """It holds the full state: resumed by name, and when no other state is intact."""
    words = [*arguments[:-1], f"ckpt_dir={tmp_path}", "trainor.lr_decay=null"]
    run_here("bin/train.py", *words, "trainor.epochs=1")
    run_dir = tmp_path / "run"
    (best,) = scored(run_dir)
    header = torch.load(run_dir / best, weights_only=True)
    state = torch.load(run_dir / "last_3.pth", weights_only=True) | {"score": header["score"]}
    torch.save(state, run_dir / best)
    (run_dir / "last_3.pth").write_bytes(b"damaged")
    done = run_here("bin/train.py", *words, "trainor.epochs=2", "ckpt=auto", "trainor.seed=3")
    assert f"Continuing {run_dir / best} after step 3" in done.stdout
    name = ["name=other", "trainor.epochs=2", f"ckpt={run_dir / best}"]
    run_here("bin/train.py", *words, *name)
    ends = [torch.load(tmp_path / f"{run}/last_3.pth")["model"] for run in ("run", "other")]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_training_continues_on_a_full_disk(
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
        done = run_here("bin/train.py", *words, "trainor.epochs=3", status=2)

    assert "Finished" not in done.stdout
    assert "training continues" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    last = tmp_path / "run/last_3.pth"
    assert "error: Trained to the end, but the state after step 9 is not on the disk" in done.stderr
    assert f"Last saved: {last}, after step 3." in done.stderr
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    done = run_here("bin/train.py", *words, "trainor.epochs=3")
    assert "Finished after 3 epochs" in done.stdout
    assert [one["epoch"] for one in lines(tmp_path) if "train_loss" in one] == [0, 1, 2]


def in_epoch(patch: pytest.MonkeyPatch, number: int, action: Callable[[Trainor], None]) -> None:
    """Run an action at the start of an epoch."""
    train = Trainor._epoch

    def epoch(self: Trainor, current: int) -> None:
        if current == number:
            action(self)
        train(self, current)

    patch.setattr(Trainor, "_epoch", epoch)


def test_a_run_deleted_during_training_is_not_finished(
    run_here: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_epoch(monkeypatch, 1, lambda trainor: shutil.rmtree(trainor.run_dir))
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.loggers=[]", "trainor.epochs=2"]
    done = run_here("bin/train.py", *words, status=2)
    assert "the state after step 6 is not on the disk" in done.stderr
    assert "Last saved: nothing: there is no " in done.stderr
    assert "Finished" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_run_deleted_after_the_last_save_is_not_finished(
    run_here: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sure = Trainor._make_sure_of_the_last_state

    def deleted(self: Trainor) -> None:
        shutil.rmtree(self.run_dir)
        make_sure(self)

    monkeypatch.setattr(Trainor, "_make_sure_of_the_last_state", deleted)
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.loggers=[]", "trainor.epochs=1"]
    done = run_here("bin/train.py", *words, status=2)
    assert "Last saved: nothing: there is no " in done.stderr


def test_the_last_save_is_retried_at_the_end(
    run_here: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, refused = Saver.save_last, []

    def refuse(self: Saver, state: dict[str, Any]) -> bool:
        refused.append(state["progress"]["step"])
        return len(refused) > 1 and save(self, state)

    monkeypatch.setattr(Saver, "save_last", refuse)
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.loggers=[]", "trainor.epochs=1"]
    done = run_here("bin/train.py", *words)
    assert refused == [3, 3]
    assert "Finished after 1 epoch (" in done.stdout
    assert torch.load(tmp_path / "run/last_3.pth", weights_only=True)["progress"]["step"] == 3


@pytest.mark.parametrize("evaluating", [False, True], ids=["training", "evaluating"])
def test_a_killed_loading_process_saves_the_state(
    run_here: Run,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluating: bool,
) -> None:
    """The state is saved as after a signal, and the resumed run equals the uninterrupted one."""
    base = [*arguments, "trainor.loggers=[]", "trainor.epochs=2", "trainor.lr_decay=null"]
    words = [*base, f"ckpt_dir={tmp_path}"]
    run_here("bin/train.py", *base, f"ckpt_dir={tmp_path / 'whole'}")
    main, armed = os.getpid(), []
    opened, score = decode._open, Validator.score

    def killed(*given: Any) -> Any:
        if armed and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(*given)

    def scored(self: Validator, *given: Any) -> Any:
        armed.append("the loading processes of this validation")
        return score(self, *given)

    def kill(trainor: Trainor) -> None:
        worker = trainor.loader._iterator._workers[0]  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()

    with monkeypatch.context() as patch:
        if evaluating:
            patch.setattr(decode, "_open", killed)
            patch.setattr(Validator, "score", scored)
        else:
            in_epoch(patch, 1, kill)
        done = run_here("bin/train.py", *words, "trainor.num_workers=1", status=2)
    assert "error: A loading process " in done.stderr
    assert "was killed (SIGKILL), often because the machine ran out of memory" in done.stderr
    last = tmp_path / "run/last_3.pth"
    assert f"{last} holds the state after step 3; ckpt=auto continues." in done.stderr
    assert "Traceback" not in done.stdout + done.stderr

    run_here("bin/train.py", *words)
    given, expected = (
        torch.load(folder / "run/last_3.pth", weights_only=True)["model"]
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    assert lines(tmp_path) == lines(tmp_path / "whole")


def hold(run_dir: Path, held: Any, done: Any) -> None:
    lock = RunLock(run_dir, 3)
    lock.acquire()
    held.set()
    done.wait(100)


def test_a_seed_is_not_trained_twice_in_one_directory(
    run_here: Run, arguments: list[str], tmp_path: Path
) -> None:
    """A second command is refused while another trains, and resumes after it is killed."""
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.loggers=[]"]
    (tmp_path / "run").mkdir()
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held, done))
    other.start()
    try:
        assert held.wait(60)
        refused = run_here("bin/train.py", *words, "trainor.epochs=1", status=2)
        assert f"seed 3 is being trained in {tmp_path}/run by another process" in refused.stderr
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".seed_3.lock"]
        run_here("bin/train.py", *words, "trainor.epochs=1", "trainor.seed=4")
    finally:
        other.kill()
        other.join()
    for epochs in (1, 2):
        run_here("bin/train.py", *words, f"trainor.epochs={epochs}")


def test_an_unwritable_disk_at_the_start_is_one_message(
    run_here: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*arguments, f"ckpt_dir={tmp_path}", "trainor.epochs=1"]

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        done = run_here("bin/train.py", *words, status=2)
    assert f"{tmp_path}/run cannot be made: Read-only file system" in done.stderr
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", read_only)
        done = run_here("bin/train.py", *words, status=2)
    assert f"{tmp_path}/run cannot be written to: Read-only file system" in done.stderr


def test_a_truncated_file_of_the_run_is_an_error(
    run_here: Run, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, f"ckpt_dir={tmp_path}", "name=run", "trainor.seed=3", "trainor.loggers=[]"]
    words += ["~validator.metrics", "trainor.early_stop_metric=validation_loss", "ckpt=auto"]
    run_here("bin/train.py", *words, "trainor.epochs=1")
    for name in ("labels.json", "vocabulary.json", "tokenizer.json"):
        (path,) = (tmp_path / "run").rglob(name)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        done = run_here("bin/train.py", *words, "trainor.epochs=2", status=2)
        assert f"error: {path}: is damaged" in done.stderr
        assert "delete the f" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        path.write_bytes(content)
