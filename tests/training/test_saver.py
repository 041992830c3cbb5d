from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.full_disk import no_file_beyond
from vilmedic.checkpoints import checkpoint
from vilmedic.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import Interrupted
from vilmedic.training.resume import Progress
from vilmedic.training.saver import Interruption, Saver


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    run_dir: Path,
    clock: Clock | None = None,
    started_from: Path | None = None,
    *,
    better: str = "lower",
    **keys: Any,
) -> Saver:
    section = TrainorSection(**keys)
    return Saver(run_dir, 1, section, better, lambda: None, clock or Clock(), started_from)


def state(value: float, size: int = 1, **more: Any) -> dict[str, Any]:
    """The state of a run with the given score."""
    said = {"metric": "validation_loss", "better": "lower", "score": value}
    return {"model": {"w": torch.full((size,), value)}, **said, **more}


def scored(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("*.pth"))


def test_steps_between_saves(tmp_path: Path) -> None:
    saver = make(tmp_path, save_every="3")
    assert [step for step in range(1, 10) if saver.due(step)] == [3, 6, 9]


def test_minutes_between_saves(tmp_path: Path) -> None:
    clock = Clock()
    saver = make(tmp_path, clock, save_every="2min")
    clock.now = 119
    assert not saver.due(1)
    clock.now = 121
    assert saver.due(2)
    saver.save_last(state(0))
    assert not saver.due(3)


def test_no_saves_within_an_epoch(tmp_path: Path) -> None:
    assert not make(tmp_path, save_every=None).due(1)


def test_the_best_are_kept(tmp_path: Path) -> None:
    saver = make(tmp_path, keep=2)
    for epoch, score in enumerate([10.0, 9.0, 2.5]):
        assert saver.save_best(state(score), score, epoch)
    (tmp_path / "1.0_0_7.pth").touch()
    assert [best.score for best in saver.best()] == [2.5, 9.0]
    assert (tmp_path / "1.0_0_7.pth").exists(), "the file of another seed is kept"


def test_stored_scores_decide_which_files_are_kept(tmp_path: Path) -> None:
    fid = {"metric": "validation_fid", "better": "lower"}
    saver = make(tmp_path, keep=1, early_stop_metric="validation_fid")
    assert saver.save_best(state(0.5, better="higher", metric="validation_fid"), 0.5, 0)
    assert saver.save_best(state(10.0, **fid), 10.0, 1)
    assert saver.save_best(state(9.0, **fid), 9.0, 2)
    # a file with the other direction is of another metric and is not removed
    assert scored(tmp_path) == ["0.5_0_1.pth", "9.0_2_1.pth"]


def test_a_damaged_best_checkpoint_is_logged_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0.1_0_1.pth").write_bytes(b"half")
    saver = make(tmp_path, keep=1)
    assert saver.save_best(state(2.0), 2.0, 1)
    assert [best.score for best in saver.best()] == [2.0]
    assert scored(tmp_path) == ["0.1_0_1.pth", "2.0_1_1.pth"]
    assert "0.1_0_1.pth: not a readable checkpoint" in caplog.text


def test_best_checkpoints_are_read_again_only_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real = [], checkpoint.read_best

    def counted(path: Path) -> checkpoint.BestCheckpoint:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(checkpoint, "read_best", counted)
    make(tmp_path).save_best(state(0.4), 0.4, 0)
    saver = make(tmp_path, keep=3)
    saver.save_best(state(0.5), 0.5, 1)
    saver.save_best(state(0.6), 0.6, 2)
    assert saver.best_score() == 0.4
    assert read == ["0.4_0_1.pth"], "files that it wrote itself are not read"
    replaced = tmp_path / "0.5_1_1.pth"
    torch.save({**torch.load(replaced), "score": 0.7}, replaced)
    assert [one.score for one in saver.best()] == [0.4, 0.6, 0.7]
    assert read[1:] == [replaced.name]


def test_full_disk_keeps_the_existing_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = make(tmp_path)
    assert saver.save_last(state(1.0))
    with no_file_beyond(20_000):
        last = saver.save_last(state(2.0, size=100_000))
        best = saver.save_best(state(2.0, size=100_000), 0.5, 1)

    assert not last
    assert not best

    assert load_checkpoint(saver.last)["model"]["w"].item() == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["last_1.pth"]
    assert caplog.text.count("training continues") == 2
    assert saver.save_last(state(3.0))
    assert load_checkpoint(saver.last)["model"]["w"].item() == 3.0


def test_a_checkpoint_is_written_after_its_dependencies(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError("no room for metrics.jsonl")

    saver = Saver(tmp_path, 1, TrainorSection(), "lower", refuse)
    assert not saver.save_last(state(1.0))
    assert not list(tmp_path.iterdir())


def test_a_file_just_written_is_never_removed(tmp_path: Path) -> None:
    save_checkpoint(state(0.5), tmp_path / "0.5_9_1.pth")
    assert make(tmp_path, keep=1).save_best(state(1.0), 2.0, 3)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["2.0_3_1.pth"]


@pytest.mark.parametrize(
    ("best", "kept"),
    [(0.7, ["0.4_5_7.pth", "0.7_1_1.pth"]), (None, ["0.4_5_7.pth"])],
    ids=["epoch 2 again", "nothing counts"],
)
def test_best_checkpoints_beyond_the_resumed_state_are_set_aside(
    tmp_path: Path, best: float | None, kept: list[str]
) -> None:
    names = ["0.7_1_1.pth", "0.5_2_1.pth", "0.4_5_7.pth"]
    for name in names:
        (tmp_path / name).touch()
    make(tmp_path).set_aside(Progress(epoch=2, best=best))
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == kept
    aside = [path.name for path in (tmp_path / "set_aside").iterdir()]
    assert sorted([*aside, *kept]) == sorted(names)


def step(number: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((1,), float(number))}, "progress": {"step": number}}


def steps_on_disk(run_dir: Path) -> dict[str, int]:
    return {
        path.name: load_checkpoint(path)["progress"]["step"] for path in run_dir.glob("*_1.pth")
    }


def test_the_previous_state_is_kept(tmp_path: Path) -> None:
    saver = make(tmp_path)
    assert saver.saved is None
    for number in (2, 4, 6):
        assert saver.save_last(step(number))
    assert steps_on_disk(tmp_path) == {"last_1.pth": 6, "previous_1.pth": 4}
    assert saver.saved == 6


def test_the_first_save_keeps_the_resumed_state(tmp_path: Path) -> None:
    """Not the file named latest: it may be damaged, or of steps that are trained again."""
    for number in (2, 4):
        make(tmp_path, started_from=tmp_path / "last_1.pth").save_last(step(number))
    assert steps_on_disk(tmp_path) == {"last_1.pth": 4, "previous_1.pth": 2}

    (tmp_path / "last_1.pth").write_bytes(b"damaged")
    make(tmp_path, started_from=tmp_path / "previous_1.pth").save_last(step(3))
    assert steps_on_disk(tmp_path) == {"last_1.pth": 3, "previous_1.pth": 2}

    save_checkpoint(step(1), tmp_path / "early.pth")
    saver = make(tmp_path, started_from=tmp_path / "early.pth")
    saver.save_last(step(2))
    assert steps_on_disk(tmp_path) == {"last_1.pth": 2, "previous_1.pth": 1}


def test_a_save_that_fails_changes_neither_state(tmp_path: Path) -> None:
    saver = make(tmp_path)
    for number in (2, 4):
        saver.save_last(step(number))
    with no_file_beyond(100):
        assert not saver.save_last(step(6))
    assert steps_on_disk(tmp_path) == {"last_1.pth": 4, "previous_1.pth": 2}
    assert saver.saved == 4
    assert "too large" in str(saver.problem)
    assert saver.save_last(step(6))
    assert saver.problem is None


def test_best_checkpoints_hold_weights_and_metadata(tmp_path: Path) -> None:
    moments = {"state": {0: {"exp_avg": torch.zeros(500)}}}
    more = {"schedule": {}, "scale": {}, "random": {}, "random_of_others": []}
    whole = {**state(1.0), "ema": {"w": torch.ones(1)}, "optimizer": moments, **more}
    saver = make(tmp_path)
    assert saver.save_best(whole, 1.0, 0)
    assert saver.save_last(whole)
    best = load_checkpoint(tmp_path / "1.0_0_1.pth")
    assert set(best) == {"model", "ema", "metric", "better", "score"}
    assert set(load_checkpoint(saver.last)) == set(whole)


def at(number: int, batch: int = 0) -> dict[str, Any]:
    """A state after an optimizer step; batch 0 is the end of an epoch."""
    return {**step(number), "progress": {"step": number, "batch": batch}}


def test_epoch_end_states_are_kept(tmp_path: Path) -> None:
    saver = make(tmp_path, keep_states=2)
    (tmp_path / "state_1_7.pth").touch()
    for number, batch in ((2, 0), (3, 4), (4, 0), (6, 0), (7, 4)):
        assert saver.save_last(at(number, batch))
        if batch == 0:
            assert (tmp_path / f"state_{number}_1.pth").samefile(saver.last), "not written twice"
    assert steps_on_disk(tmp_path) == {
        "last_1.pth": 7,
        "previous_1.pth": 6,
        "state_4_1.pth": 4,
        "state_6_1.pth": 6,
    }
    assert (tmp_path / "state_1_7.pth").exists(), "the file of another seed is kept"


def test_states_are_kept_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When they are no longer the latest; nothing is written twice."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    saver = make(tmp_path, keep_states=2)
    for number, batch in ((2, 0), (3, 4), (4, 0)):
        assert saver.save_last(at(number, batch))
    assert steps_on_disk(tmp_path) == {"last_1.pth": 4, "previous_1.pth": 3, "state_2_1.pth": 2}

    saver = make(tmp_path, started_from=saver.last, keep_states=2)
    saver.set_aside(Progress(step=4))
    for number in (6, 8, 9):
        assert saver.save_last(at(number))
    assert steps_on_disk(tmp_path) == {"last_1.pth": 9, "state_6_1.pth": 6, "state_8_1.pth": 8}


def test_a_state_not_kept_by_a_killed_run_is_kept_on_resume(tmp_path: Path) -> None:
    save_checkpoint(at(4), tmp_path / "last_1.pth")
    for name in ("state_1_1.pth", "state_2_1.pth"):
        save_checkpoint(at(int(name[6])), tmp_path / name)
    make(tmp_path, started_from=tmp_path / "last_1.pth", keep_states=2).set_aside(Progress(step=4))
    assert steps_on_disk(tmp_path) == {"last_1.pth": 4, "state_2_1.pth": 2, "state_4_1.pth": 4}


def test_states_of_steps_that_are_trained_again_are_set_aside(tmp_path: Path) -> None:
    for number in (2, 4, 6):
        save_checkpoint(at(number), tmp_path / f"state_{number}_1.pth")
    saver = make(tmp_path, started_from=tmp_path / "state_4_1.pth", keep_states=3)
    saver.set_aside(Progress(step=4))
    assert [path.name for path in (tmp_path / "set_aside").iterdir()] == ["state_6_1.pth"]
    assert saver.save_last(at(6))
    assert steps_on_disk(tmp_path) == {
        "last_1.pth": 6,
        "previous_1.pth": 4,
        "state_2_1.pth": 2,
        "state_4_1.pth": 4,
        "state_6_1.pth": 6,
    }


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".0.5_2_1.pth.tmp").write_bytes(b"half")
    (tmp_path / ".last_1.pth.tmp").mkdir()
    (tmp_path / ".last_7.pth.tmp").write_bytes(b"of a run that is being trained")
    make(tmp_path).set_aside(Progress())
    assert [path.name for path in tmp_path.iterdir()] == [".last_7.pth.tmp"]


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    """A process started in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_recorded_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert interruption.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received == signal.SIGTERM
        assert interruption.stop("saved").status == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_ends_validation_at_once() -> None:
    reached = []

    def evaluate(interruption: Interruption) -> None:
        with interruption.may_come_at_once():
            reached.append("begin")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("end")

    with Interruption() as interruption:
        with pytest.raises(Interrupted):
            evaluate(interruption)
        with pytest.raises(Interrupted):
            evaluate(interruption)
    assert reached == ["begin"]


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_install_no_handlers() -> None:
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            with Interruption():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed
