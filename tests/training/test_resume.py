from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.full_disk import odd_file
from vilmedic.checkpoints import checkpoint
from vilmedic.checkpoints.checkpoint import save_checkpoint
from vilmedic.checkpoints.run_directory import RunLock
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.training.resume import claim_start, find_start, log_changes, position, restoring


def config(run_dir: Path, ckpt: str | None, seed: int | None = None) -> Any:
    return SimpleNamespace(run_dir=run_dir, ckpt=ckpt, trainor=TrainorSection(seed=seed))


def whole(seed: int) -> dict[str, Any]:
    """The parts of a resumable state besides weights."""
    return {"progress": {}, "optimizer": {}, "seed": seed, "config": {}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Runs with seeds 4 and 5; seed 5 is newer."""
    for seed in (4, 5):
        state = {"model": {"weight": torch.zeros(1)}, **whole(seed)}
        save_checkpoint(state, tmp_path / f"last_{seed}.pth")
        os.utime(tmp_path / f"last_{seed}.pth", (seed, seed))
    return tmp_path


def test_last_is_the_latest_or_that_of_the_seed(run_dir: Path) -> None:
    assert find_start(config(run_dir, "last")).seed == 5
    assert find_start(config(run_dir, "last", seed=4)).path == run_dir / "last_4.pth"
    with pytest.raises(CheckpointError, match="there is no file 'last'"):
        find_start(config(run_dir, "last", seed=6))


def test_auto_resumes_if_there_is_a_state(run_dir: Path, tmp_path: Path) -> None:
    assert find_start(config(run_dir, "auto")).path == run_dir / "last_5.pth"
    new = find_start(config(run_dir, "auto", seed=6))
    assert (new.seed, new.path) == (6, None)
    assert find_start(config(tmp_path / "empty", "auto", seed=2)).state is None


def test_file_of_another_seed_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"given 9, but .*last_5\.pth continues a run with seed"):
        find_start(config(run_dir, "last_5.pth", seed=9))


def test_weights_only_files_cannot_be_resumed(tmp_path: Path) -> None:
    save_checkpoint({"model": {"w": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"holds weights only.* with ckpt=auto\.$"):
        find_start(config(tmp_path, "w.pth"))


def save_best(run_dir: Path, name: str) -> Path:
    """Save a best checkpoint of seed 4, as training does."""
    weights = {"cnn.network.w": torch.zeros(64), "encoder.network.w": torch.zeros(1)}
    state = {"model": weights, **whole(4), "score": 0.5, "metric": "validation_loss"}
    save_checkpoint(checkpoint.weights_of(state), run_dir / name)
    return run_dir / name


def test_a_best_checkpoint_names_the_remedies(tmp_path: Path) -> None:
    path = save_best(tmp_path, "0.5_1_4.pth")
    told = f"ckpt=auto, or start a new run from its weights: model.cnn.pretrained={path} "
    with pytest.raises(CheckpointError) as caught:
        find_start(config(tmp_path, path.name))
    assert f"{told}model.encoder.pretrained={path}." in str(caught.value)


def test_weights_only_files_are_no_fallback_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not damaged and do not block: the previous state is resumed, or the run starts."""
    best = save_best(tmp_path, "0.5_1_4.pth")
    start = find_start(config(tmp_path, "auto", seed=4))
    assert (start.seed, start.path, start.damaged) == (4, None, ())
    assert "no state of seed 4 can be continued" in caplog.text
    assert find_start(config(tmp_path, "auto")).seed != 4
    (tmp_path / "config_4.yml").touch()
    assert find_start(config(tmp_path, "auto")).seed != 4, "the run has saved something"
    with pytest.raises(ConfigError, match=r"a run with seed 4\. Give another seed"):
        find_start(config(tmp_path, None, seed=4))

    save_steps(tmp_path, **{"0.7_0_4": 3}, state_5_4=5, state_11_4=11, last_4=20)
    damage(tmp_path / "last_4.pth", "zeros")
    assert find_start(config(tmp_path, "auto")).path == tmp_path / "state_11_4.pth"
    for step in (5, 11):
        damage(tmp_path / f"state_{step}_4.pth", "text")
    start = find_start(config(tmp_path, "auto"))
    assert start.path == tmp_path / "0.7_0_4.pth", "a full state from an earlier version"
    assert best not in start.damaged


def test_kept_states_count_as_a_run(tmp_path: Path) -> None:
    save_steps(tmp_path, state_10_4=10)
    assert find_start(config(tmp_path, "auto")).path == tmp_path / "state_10_4.pth"
    assert find_start(config(tmp_path, "state_10_4.pth")).seed == 4
    with pytest.raises(ConfigError, match=r"ckpt=state_10_4\.pth, or give another seed"):
        find_start(config(tmp_path, None, seed=4))


def test_changes_are_reported_by_their_keys(caplog: pytest.LogCaptureFixture) -> None:
    saved = {"name": "a", "trainor": {"epochs": 1, "optim_params": {"lr": 0.1}, "seed": 3}, "x": []}
    now = {"name": "b", "trainor": {"epochs": 2, "optim_params": {}, "ema": 0.9}, "x": []}
    assert log_changes(saved, now) == [
        "trainor.epochs: 1 -> 2",
        "trainor.optim_params.lr: 0.1 -> (absent)",
        "trainor.ema: (absent) -> 0.9",
    ]
    assert log_changes(saved, saved) == []


def test_resume_position_counts_samples() -> None:
    saved = {"trainor": {"batch_size": 32}}
    assert position(6, saved, 32) == 6
    assert position(6, saved, 64) == 3
    assert position(6, saved, 50) == 3


def test_a_run_killed_before_its_first_save_starts_again(tmp_path: Path) -> None:
    for seed in (4, 7, 5):
        (tmp_path / f"config_{seed}.yml").touch()
        os.utime(tmp_path / f"config_{seed}.yml", (seed, seed))
    start = find_start(config(tmp_path, "auto"))
    assert (start.seed, start.path) == (7, None)
    assert find_start(config(tmp_path, "auto", seed=2)).seed == 2
    assert find_start(config(tmp_path, None)).seed not in (4, 5, 7)


def test_a_checkpoint_of_another_directory_is_refused_for_a_used_seed(
    run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    given, other = str(run_dir / "last_4.pth"), tmp_path_factory.mktemp("other")
    assert not find_start(config(run_dir, given)).moved
    assert find_start(config(other, given)).moved
    (other / "last_4.pth").touch()
    with pytest.raises(ConfigError, match="already holds a run with seed 4"):
        find_start(config(other, given))


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    other = {"model": {"w": torch.zeros(1)}}
    match kind:
        case "cut short":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "a flipped bit":
            place = content.index(torch.zeros(64).numpy().tobytes())
            path.write_bytes(content[:place] + b"\x10" + content[place + 1 :])
        case "zeros":
            path.write_bytes(bytes(len(content)))
        case "text":
            path.write_text("<html>quota exceeded</html>")
        case "weights only":
            save_checkpoint(other, path)
        case "of another seed":
            save_checkpoint({**other, **whole(77)}, path)
        case "a folder" | "a named pipe":
            path.unlink()
            odd_file(path, kind)


DAMAGES = ("cut short", "empty", "a flipped bit", "zeros", "text", "weights only")
DAMAGES += ("of another seed", "a folder", "a named pipe")


def save_steps(run_dir: Path, **files: int) -> None:
    """Write states of seed 4 after the given numbers of steps; the last one is the latest."""
    for number, (name, step) in enumerate(files.items()):
        state = {"model": {"weight": torch.zeros(64)}, **whole(4)}
        path = run_dir / f"{name}.pth"
        save_checkpoint({**state, "progress": {"step": step}}, path)
        os.utime(path, (number, number))


@pytest.mark.parametrize("seed", [4, None])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_set_aside_and_the_previous_one_resumed(
    tmp_path: Path, kind: str, seed: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, previous_4=10, last_4=20)
    damage(tmp_path / "last_4.pth", kind)

    start, lock = claim_start(config(tmp_path, "auto", seed=seed))

    assert lock is not None
    lock.release()
    assert (start.seed, start.path) == (4, tmp_path / "previous_4.pth")
    assert start.state is not None
    assert start.state["progress"]["step"] == 10
    assert "resumes from previous_4.pth, after step 10" in caplog.text
    assert not (tmp_path / "last_4.pth").exists()
    assert (tmp_path / "set_aside" / "last_4.pth").exists()
    again, lock = claim_start(config(tmp_path, "auto", seed=seed))
    assert lock is not None
    lock.release()
    assert again.path == start.path


def test_a_requested_damaged_state_names_the_previous_one(tmp_path: Path) -> None:
    save_steps(tmp_path, previous_4=10, last_4=20)
    damage(tmp_path / "last_4.pth", "cut short")
    for ckpt in ("last", "last_4.pth"):
        with pytest.raises(CheckpointError, match=r"last_4\.pth: .*ckpt=previous_4\.pth"):
            find_start(config(tmp_path, ckpt))
    assert find_start(config(tmp_path, "previous_4.pth")).seed == 4


def test_a_restarted_job_resumes_despite_damaged_states(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resumes from an old best checkpoint if both states are damaged, and else from the start."""
    save_steps(tmp_path, **{"0.5_1_4": 5, "0.7_2_4": 8}, previous_4=10, last_4=20)
    for kind, name in (("zeros", "last_4.pth"), ("empty", "previous_4.pth")):
        damage(tmp_path / name, kind)
    assert find_start(config(tmp_path, "auto")).path == tmp_path / "0.7_2_4.pth"
    for path in tmp_path.glob("*.pth"):
        damage(path, "text")
    start, lock = claim_start(config(tmp_path, "auto"))
    assert lock is not None
    lock.release()
    assert (start.seed, start.path) == (4, None)
    assert "no state of seed 4 can be continued: the run starts from the beginning" in caplog.text
    assert len(list((tmp_path / "set_aside").iterdir())) == 4
    assert not list(tmp_path.glob("*.pth"))


def test_an_io_error_does_not_restart_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, previous_4=10, last_4=20)

    def refuse(path: Path) -> dict[str, Any]:
        raise CheckpointError(f"{path}: cannot be read: stale") from OSError(116, "stale")

    monkeypatch.setattr(checkpoint, "load_checkpoint", refuse)
    with pytest.raises(CheckpointError, match="stale"):
        find_start(config(tmp_path, "auto"))


def test_a_previous_state_without_a_latest_one_is_resumed(tmp_path: Path) -> None:
    """For example after a killed save on a file system without hard links."""
    save_steps(tmp_path, previous_4=10)
    assert find_start(config(tmp_path, "auto")).path == tmp_path / "previous_4.pth"
    with pytest.raises(ConfigError, match=r"ckpt=previous_4\.pth, or give another seed"):
        find_start(config(tmp_path, None, seed=4))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "x"},
        {"seed": -1},
        {"seed": True},
        {"config": None},
        {"progress": []},
        {"progress": {"step": "7"}},
        {"progress": {"step": -1}},
        {"progress": {"epoch": 2**80}},
        {"progress": {"steps": 1}},
        {"progress": {"tally": [1.0]}},
        {"progress": {"tally": 3}},
        {"progress": {"best": "0.5"}},
        {"progress": {3: 4}},
    ],
    ids=str,
)
def test_an_impossible_state_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    state = {"model": {"w": torch.zeros(1)}, **whole(4)}
    save_checkpoint({**state, **change}, tmp_path / "last_4.pth")
    with pytest.raises(CheckpointError, match=r"last_4\.pth: is damaged"):
        find_start(config(tmp_path, "last_4.pth"))


def test_a_state_of_wrong_types_is_an_error_when_loaded() -> None:
    message = r"x\.pth: the training state .*KeyError"
    with pytest.raises(CheckpointError, match=message), restoring(Path("x.pth")):
        raise KeyError("scale")
    with pytest.raises(torch.OutOfMemoryError), restoring(Path("x.pth")):
        raise torch.OutOfMemoryError("the GPU is full")


def test_a_state_saved_by_another_process_meanwhile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, last_4=10)
    taken = RunLock.acquire

    def wait(self: RunLock) -> None:
        taken(self)
        save_steps(tmp_path, last_4=20)

    monkeypatch.setattr(RunLock, "acquire", wait)
    start, lock = claim_start(config(tmp_path, "auto"))
    assert lock is not None
    lock.release()
    assert start.state is not None
    assert start.state["progress"]["step"] == 20
