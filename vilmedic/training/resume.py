"""Choice of the state that a run resumes from, and its differences from the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vilmedic.checkpoints import checkpoint
from vilmedic.checkpoints.run_directory import (
    RunLock,
    choose_seed,
    make_run_directory,
    set_aside,
    unsaved_seed,
)
from vilmedic.distributed import processes
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.files import identity
from vilmedic.log import LOGGER
from vilmedic.loggers.contract import flat

if TYPE_CHECKING:
    from vilmedic.config.load import Config

UNTOLD = ("ckpt", "ckpt_dir", "name", "trainor.seed")
"""Keys that locate a run and do not change its result."""


@dataclass
class Progress:
    """Progress of a run in a checkpoint, besides tensors and random numbers.

    Args:
        epoch: the epoch that is being trained, counted from 0.
        batch: batches of it that were trained on.
        step: optimizer steps taken or skipped.
        best: the best score so far.
        stale: evaluations in a row without improvement.
        lines: lines written to metrics.jsonl.
        tally: what `Tally` holds.
        evaluated: the step of the last evaluation.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float | None = None
    stale: int = 0
    lines: int = 0
    tally: list[float] = field(default_factory=lambda: [0.0] * 5)
    evaluated: int = 0


@dataclass(frozen=True)
class Start:
    """Starting point of a run.

    Args:
        seed: the run's seed.
        path: the checkpoint to continue from; None at the very beginning.
        state: its contents.
        moved: whether it comes from another directory than the run's.
        damaged: newer states of the run, which could not be read.
        seen: identity of the file when it was read.
    """

    seed: int
    path: Path | None = None
    state: dict[str, Any] | None = None
    moved: bool = False
    damaged: tuple[Path, ...] = ()
    seen: tuple[int, ...] | None = None

    @property
    def saved(self) -> dict[str, Any]:
        """The configuration of the checkpoint."""
        return {} if self.state is None else self.state["config"]


def find_start(config: Config) -> Start:
    """Return the checkpoint that `ckpt` names and its seed, or a new run with its seed.

    Raises:
        CheckpointError: there is no such checkpoint, or training cannot continue from it.
        ConfigError: `trainor.seed` is that of another run, or the checkpoint comes from another
            directory and a run with its seed is already here.
    """
    wanted, run_dir = config.trainor.seed, config.run_dir
    if config.ckpt is None:
        return Start(choose_seed(run_dir, wanted))
    if config.ckpt == "auto":
        seed = checkpoint.newest_seed(run_dir) if wanted is None else wanted
        there = [] if seed is None else _left_by(run_dir, seed)
        if seed is not None and there:
            return _newest_whole(there, seed)
        LOGGER.info("ckpt=auto: nothing to continue in %s, a new run begins", run_dir)
        # A run that was killed before its first save starts again with the same seed.
        begun = unsaved_seed(run_dir) if wanted is None else wanted
        return Start(choose_seed(run_dir, begun))
    path = checkpoint.locate(config.ckpt, run_dir, wanted)
    seen = identity(path)
    try:
        state = load_state(path)
    except CheckpointError as error:
        others = [one.name for one in _others(path)]
        if not others:
            raise
        raise CheckpointError(f"{error} The state before it: ckpt={others[0]}.") from error
    if wanted not in (None, state["seed"]):
        raise ConfigError(
            f"trainor.seed: given {wanted}, but {path} continues a run with seed "
            f"{state['seed']}. Leave the key out."
        )
    moved = path.parent.resolve() != run_dir.resolve()
    if moved:
        choose_seed(run_dir, state["seed"])
    return Start(state["seed"], path, state, moved, seen=seen)


def _left_by(run_dir: Path, seed: int) -> list[Path]:
    """Return the checkpoints a run may resume from: states, then best ones, newest first.

    Best ones hold weights only, but those of earlier versions can be continued.
    """
    best = sorted(checkpoint.scored(run_dir, seed), key=checkpoint.epoch_of, reverse=True)
    return [*checkpoint.states(run_dir, seed), *best]


def _others(path: Path) -> list[Path]:
    """Return the previous state, for the case that the newest one is damaged."""
    match = checkpoint.STATE_NAME.fullmatch(path.name)
    if match is None or match["kind"] != "last":
        return []
    previous = path.with_name(checkpoint.previous_name(int(match["seed"])))
    return [previous] if previous.is_file() else []


def _newest_whole(paths: list[Path], seed: int) -> Start:
    """Return the newest readable state of a run, or its start if none is readable.

    A job that a cluster restarts has no user who could choose another file.

    Raises:
        CheckpointError: none can be read, and it is the disk that refuses one.
    """
    damaged: list[Path] = []
    refused: CheckpointError | None = None
    for path in paths:
        seen = identity(path)
        try:
            state = load_state(path)
            if state["seed"] != seed:
                raise CheckpointError(f"{path}: holds a run with seed {state['seed']}.")
        except CheckpointError as error:
            if isinstance(error, WeightsOnly) and checkpoint.NAME.fullmatch(path.name):
                continue
            LOGGER.warning("ckpt=auto: %s", error)
            damaged.append(path)
            refused = error if isinstance(error.__cause__, OSError) else refused
            continue
        if damaged:
            LOGGER.warning(
                "ckpt=auto: %s cannot be resumed, so the run resumes from %s, after step %d; "
                "what came after it is trained again",
                ", ".join(one.name for one in damaged),
                path.name,
                state["progress"].get("step", 0),
            )
        return Start(seed, path, state, damaged=tuple(damaged), seen=seen)
    if refused is not None:
        raise refused
    LOGGER.warning(
        "ckpt=auto: no state of seed %d can be continued: the run starts from the beginning", seed
    )
    return Start(seed, damaged=tuple(damaged))


class WeightsOnly(CheckpointError):
    """A checkpoint without training state, such as the best checkpoints of a run."""


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint that training can resume from.

    Raises:
        CheckpointError: it cannot be read, or lacks what training needs.
    """
    state = checkpoint.load_checkpoint(path)
    if not checkpoint.can_continue(state):
        encoders = [
            f"model.{part}.pretrained={path}"
            for part in ("cnn", "encoder")
            if any(name.startswith(f"{part}.") for name in state["model"])
        ]
        instead = f", or start a new run from its weights: {' '.join(encoders)}" if encoders else ""
        raise WeightsOnly(
            f"{path}: holds weights only, so training cannot continue from it. Continue the newest "
            f"state of a run with ckpt=auto{instead}."
        )
    if not (_is_count(state.get("seed")) and isinstance(state.get("config"), dict)):
        raise CheckpointError(f"{path}: is damaged: it has no seed or no configuration.")
    if not _is_setting(state["config"]):
        raise CheckpointError(f"{path}: is damaged: its configuration holds other than settings.")
    given = state["progress"] or {}
    unknown = sorted(set(map(str, given)) - {one.name for one in fields(Progress)})
    names = ("epoch", "batch", "step", "stale", "lines", "evaluated")
    counts = [given.get(name, 0) for name in names]
    tally, best = given.get("tally", [0.0] * 5), given.get("best")
    numbers = [*tally, best or 0.0] if isinstance(tally, list) and len(tally) == 5 else [None]
    if unknown or not all(map(_is_count, counts)) or not all(map(_is_number, numbers)):
        raise CheckpointError(f"{path}: is damaged: what it says of its progress is not possible.")
    return state


def _is_setting(value: Any) -> bool:
    """Return whether a value can be written in a configuration file."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_setting(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, str | int | float)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""Errors that a value of the wrong type raises."""


@contextmanager
def restoring(path: Path | None) -> Iterator[None]:
    """Context in which errors from the contents of a checkpoint become a `CheckpointError`.

    Raises:
        CheckpointError: the contents are incomplete or of the wrong type.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _ODD as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path}: the training state in it is incomplete or of another kind "
            f"({type(error).__name__}: {reason}). Its weights may still be evaluated."
        ) from error


def claim_start(config: Config) -> tuple[Start, RunLock | None]:
    """Find the starting point of a run, create its directory and lock its seed.

    Returns:
        The start, and the lock that the main process holds.

    Raises:
        CheckpointError, ConfigError: see `find_start`; or another process trains this run.
    """
    if not processes.is_main():
        return _shared_start([]), None
    found = find_start(config)
    make_run_directory(config.run_dir)
    lock = RunLock(config.run_dir, found.seed)
    lock.acquire()
    try:
        if found.path is not None and identity(found.path) != found.seen:
            found = find_start(config)  # the process that held the lock has saved again
        for path in found.damaged:
            set_aside(path)
        _shared_start([found.seed, None if found.path is None else str(found.path), found.moved])
    except BaseException:
        lock.release()
        raise
    return found, lock


def _shared_start(own: list[Any]) -> Start:
    """The start that the main process sends to the others, as they see it."""
    seed, path, moved = processes.on_main(lambda: own)
    if path is None or processes.is_main():
        return Start(seed)
    return Start(seed, Path(path), checkpoint.load_checkpoint(Path(path)), moved)


def log_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Log and return the keys whose values differ, as `key: old -> new`."""
    before, after = dict(flat(saved)), dict(flat(now))
    keys = [key for key in [*before, *after] if key not in UNTOLD]
    lines = [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in dict.fromkeys(keys)
        if before.get(key, "(absent)") != after.get(key, "(absent)")
    ]
    if lines:
        LOGGER.info("The configuration has changed since:\n  %s", "\n  ".join(lines))
    else:
        LOGGER.info("The configuration is that of the checkpoint")
    return lines


def position(batch: int, saved: dict[str, Any], batch_size: int) -> int:
    """Return the number of batches that hold the samples seen in the epoch.

    Args:
        batch: batches trained on when the checkpoint was written.
        saved: the configuration of then.
        batch_size: samples per batch now.
    """
    return batch * int(saved["trainor"]["batch_size"]) // batch_size
