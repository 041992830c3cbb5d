from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from tests.full_disk import no_file_beyond
from vilmedic.checkpoints.run_directory import (
    RunLock,
    choose_seed,
    git_commit,
    make_run_directory,
    set_aside,
    shared,
    used_seeds,
    write_provenance,
)
from vilmedic.errors import ConfigError


def test_seeds_of_earlier_runs_are_known(tmp_path: Path) -> None:
    for name in ("last_3.pth", "config_8.yml", "2.5_1_9.pth", "metrics.jsonl"):
        (tmp_path / name).touch()
    assert used_seeds(tmp_path) == {3, 8}
    assert used_seeds(tmp_path / "absent") == set()


def test_used_seed_is_refused_with_both_remedies(tmp_path: Path) -> None:
    (tmp_path / "last_3.pth").touch()
    with pytest.raises(ConfigError, match=r"ckpt=last_3\.pth, or give another seed"):
        choose_seed(tmp_path, 3)
    assert choose_seed(tmp_path, 4) == 4


def test_drawn_seed_is_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "last_3.pth").touch()
    drawn = iter([3, 3, 11])
    monkeypatch.setattr(
        "vilmedic.checkpoints.run_directory.secrets.randbelow", lambda limit: next(drawn)
    )
    assert choose_seed(tmp_path, None) == 11


def test_commit_is_a_hash_or_unknown() -> None:
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_full_disk_keeps_the_previous_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config: Any = SimpleNamespace(to_yaml=lambda: "epochs: 3\n" * 1000, overrides=[])
    (tmp_path / "config_3.yml").write_text("epochs: 2\n")
    with no_file_beyond(100):
        write_provenance(config, tmp_path, 3, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["config_3.yml"]
    assert (tmp_path / "config_3.yml").read_text() == "epochs: 2\n"
    assert caplog.text.count("could not be written") == 2
    write_provenance(config, tmp_path, 3, "cpu")
    assert len((tmp_path / "config_3.yml").read_text()) == 10_000


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    make_run_directory(tmp_path / "a" / "b")
    make_run_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^ckpt_dir: the folder .*file/run cannot be made: N"):
        make_run_directory(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"^ckpt_dir: the folder /dev/null/run cannot be made"):
        make_run_directory(Path("/dev/null/run"))


def train_until(run_dir: Path, seed: int, ready: Any, done: Any) -> None:
    """Hold the lock as a command does: it forks a loading process that outlives it."""
    lock = RunLock(run_dir, seed)
    lock.acquire()
    if os.fork() == 0:
        done.wait(60)
        os._exit(0)
    ready.set()
    time.sleep(60)


def test_two_processes_cannot_train_the_same_seed_in_a_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=train_until, args=(tmp_path, 3, ready, done))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ConfigError) as caught:
            RunLock(tmp_path, 3).acquire()
        assert f"seed 3 is being trained in {tmp_path} by another process" in str(caught.value)
        assert f"(process {process.pid} on " in str(caught.value)
        other = RunLock(tmp_path, 4)
        other.acquire()
        other.release()

        process.kill()
        process.join()
        mine = RunLock(tmp_path, 3)
        mine.acquire()  # succeeds although a child of the other process still runs
        assert f"process {os.getpid()} on" in (tmp_path / ".seed_3.lock").read_text()
        mine.release()
        mine = RunLock(tmp_path, 3)
        mine.acquire()
        mine.release()
    finally:
        done.set()
        process.kill()
        process.join()


def test_a_run_without_output_leaves_no_folder(tmp_path: Path) -> None:
    for name, left in (("refused", None), ("run", "config_3.yml")):
        folder = tmp_path / name
        folder.mkdir()
        lock = RunLock(folder, 3)
        lock.acquire()
        if left:
            (folder / left).touch()
        lock.release()
        lock.release()  # a second release has no effect
        assert folder.exists() == bool(left)
    assert sorted(path.name for path in folder.iterdir()) == [".seed_3.lock", "config_3.yml"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunLock(tmp_path, 3).acquire()
    with shared(FileLock(tmp_path / ".metrics.lock", fallback_to_soft=False)):
        (tmp_path / "metrics.jsonl").write_text("written all the same")
    assert caplog.text.count("file system without locks") == 1


def test_an_unwritable_directory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"ckpt_dir: .*file/run cannot be made: Not a dir"):
        make_run_directory(tmp_path / "file" / "run")

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match="cannot be written to: Read-only file system"):
        RunLock(tmp_path, 3).acquire()


def test_set_aside_replaces_an_earlier_copy(tmp_path: Path) -> None:
    for content in ("one", "two"):
        (tmp_path / "last_3.pth").write_text(content)
        assert set_aside(tmp_path / "last_3.pth")
    assert (tmp_path / "set_aside" / "last_3.pth").read_text() == "two"
    (tmp_path / "last_3.pth").mkdir()
    assert set_aside(tmp_path / "last_3.pth")
    assert (tmp_path / "set_aside" / "last_3.pth").is_dir()
    assert not (tmp_path / "last_3.pth").exists()


def test_set_aside_without_a_folder_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "set_aside").touch()
    (tmp_path / "last_3.pth").touch()
    assert not set_aside(tmp_path / "last_3.pth")
    assert "could not be set aside" in caplog.text
    assert (tmp_path / "last_3.pth").exists()
