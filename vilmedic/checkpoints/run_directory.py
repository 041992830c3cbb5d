"""The run directory: seeds, locks, configuration and environment."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from vilmedic.checkpoints.checkpoint import STATE_NAME, scored, states
from vilmedic.errors import ConfigError
from vilmedic.files import replace_text
from vilmedic.log import LOGGER

if TYPE_CHECKING:
    from vilmedic.config.load import Config

SET_ASIDE = "set_aside"
"""Folder of a run directory for files that a resumed run replaced, and for damaged ones."""
FIGURES = "pictures"
"""Folder of a run directory for figures of the training, one for each `<seed>_<step>`."""
WAIT_FOR_RUN = 2.0  # seconds, within which a killed process is gone
WAIT_FOR_FILE = 20.0  # seconds; a file shared by seeds is locked for milliseconds
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""Errors of file systems without locks."""
PACKAGES = ("vilmedic", "torch", "torchvision", "transformers", "tokenizers", "omegaconf", "numpy")


def make_run_directory(run_dir: Path) -> None:
    """Make the folder of a run, and those above it.

    Raises:
        ConfigError: there is a file in its place or above it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"ckpt_dir: the folder {run_dir} cannot be made: {error.strerror}. Name another folder "
            "with ckpt_dir."
        ) from error


def used_seeds(run_dir: Path) -> set[int]:
    """Return the seeds of all runs with files in a run directory."""
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    configs = [re.fullmatch(r"config_(?P<seed>[0-9]+)\.yml", name) for name in names]
    found = [*configs, *map(STATE_NAME.fullmatch, names)]
    return {int(match["seed"]) for match in found if match is not None}


def unsaved_seed(run_dir: Path) -> int | None:
    """Return the seed of the newest run that ended before its first save; None without one."""
    begun = [
        path
        for path in run_dir.glob("config_*.yml")
        if (match := re.fullmatch(r"config_([0-9]+)\.yml", path.name))
        and not states(run_dir, int(match[1]))
        and not scored(run_dir, int(match[1]))
    ]
    newest = max(begun, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if newest is None else int(newest.stem.removeprefix("config_"))


def choose_seed(run_dir: Path, wanted: int | None) -> int:
    """Return the seed of a new run: the given one, or a random one.

    Raises:
        ConfigError: a run with this seed is already there.
    """
    used = used_seeds(run_dir)
    if wanted is None:
        return next(
            seed for seed in iter(lambda: secrets.randbelow(1_000_000), None) if seed not in used
        )
    if wanted not in used:
        return wanted
    there = states(run_dir, wanted)
    if there or scored(run_dir, wanted):
        remedy = f"Continue it with ckpt={there[0].name}, or give" if there else "Give"
        raise ConfigError(
            f"trainor.seed: {run_dir} already holds a run with seed {wanted}. {remedy} another "
            "seed or another name."
        )
    return wanted


class RunLock:
    """Lock that keeps other processes from training the same seed in the same directory.

    The system releases the lock when its process ends, even by a kill. The lock file
    `.seed_<seed>.lock` names the process that holds it, and stays beside the files of the run.

    Args:
        run_dir: the directory of the run.
        seed: the run's seed.
    """

    def __init__(self, run_dir: Path, seed: int) -> None:
        self._run_dir, self._seed = run_dir, seed
        self._path = run_dir / f".seed_{seed}.lock"
        self._lock = FileLock(self._path, fallback_to_soft=False)

    def acquire(self) -> None:
        """Take the lock; a file system without locks is a warning.

        Raises:
            ConfigError: another process holds it, or the directory cannot be written to.
        """
        try:
            held = acquire(self._lock, WAIT_FOR_RUN)
        except Timeout:
            raise ConfigError(
                f"name, trainor.seed: seed {self._seed} is being trained in {self._run_dir} by "
                f"another process{self._holder()}. Give another name or seed, or wait for its end."
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"ckpt_dir: the folder {self._run_dir} cannot be written to: {reason}."
            ) from None
        if held:
            try:
                self._path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
            except OSError:  # a full disk: the lock works without the name
                return

    def release(self) -> None:
        """Release the lock, and remove a directory in which the run has left nothing else."""
        if self._lock.is_locked:
            with suppress(OSError):
                if [path.name for path in self._run_dir.iterdir()] == [self._path.name]:
                    self._path.unlink()
                    self._run_dir.rmdir()
        self._lock.release()

    def _holder(self) -> str:
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")[:200].strip()
        except OSError:
            return ""
        return f" ({text})" if text.isprintable() and text else ""


def acquire(lock: FileLock, seconds: float) -> bool:
    """Take a lock, or warn that the file system has none.

    Args:
        lock: the lock.
        seconds: how long to wait for another process.

    Returns:
        Whether it is held.

    Raises:
        Timeout: another process holds it.
        OSError: its file cannot be made.
    """
    folder = Path(lock.lock_file).parent
    if not folder.is_dir():  # filelock would make it again
        raise FileNotFoundError(errno.ENOENT, "The folder is gone", str(folder))
    try:
        lock.acquire(timeout=seconds, poll_interval=0.02)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        if folder not in _WITHOUT_LOCKS:
            _WITHOUT_LOCKS.add(folder)
            LOGGER.warning(
                "%s is on a file system without locks: take care that no two processes write the "
                "same seed or file there at the same time",
                folder,
            )
        return False
    return True


_WITHOUT_LOCKS: set[Path] = set()
"""Folders that have been warned about."""


@contextmanager
def shared(lock: FileLock) -> Iterator[None]:
    """Context in which runs of other seeds do not touch a file."""
    try:
        held = acquire(lock, WAIT_FOR_FILE)
    except Timeout:
        LOGGER.warning(
            "%s has been locked for %d s, continuing",
            lock.lock_file,
            WAIT_FOR_FILE,
        )
        held = False
    try:
        yield
    finally:
        if held:
            lock.release()


def set_aside(path: Path) -> bool:
    """Move a file of a run directory into its folder `set_aside`, which nothing reads."""
    folder = path.parent / SET_ASIDE
    try:
        folder.mkdir(exist_ok=True)
        remove(folder / path.name)
        os.replace(path, folder / path.name)
    except OSError as error:
        LOGGER.warning("%s could not be set aside: %s", path, error)
        return False
    LOGGER.info("Set aside: %s", folder / path.name)
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def describe_environment(
    config: Config, seed: int, device: str, *, tf32: bool = False
) -> dict[str, Any]:
    """Return everything needed to repeat a run: command, overrides, versions, commit, device."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": sys.argv,
        "overrides": list(config.overrides),
        "seed": seed,
        "device": device,
        "tf32": tf32,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the commit of the running code, with `-dirty` if files differ; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def write_provenance(
    config: Config, run_dir: Path, seed: int, device: str, *, tf32: bool = False
) -> None:
    """Write `config_<seed>.yml` and `environment_<seed>.json` into the run directory.

    A full disk is a warning; earlier files are kept.

    Args:
        config: the configuration of the run.
        run_dir: its directory.
        seed: its seed.
        device: its device.
        tf32: whether float32 products are computed in TF32.
    """
    environment = json.dumps(describe_environment(config, seed, device, tf32=tf32), indent=2)
    texts = {f"config_{seed}.yml": config.to_yaml(), f"environment_{seed}.json": environment + "\n"}
    for name, text in texts.items():
        try:
            replace_text(run_dir / name, text)
        except OSError as error:
            LOGGER.warning("%s could not be written: %s", run_dir / name, error)
