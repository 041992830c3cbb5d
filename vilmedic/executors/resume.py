"""What a run continues from, and how that differs from what it is asked to do now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilmedic import distributed
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.executors import checkpoint
from vilmedic.executors.log import LOGGER
from vilmedic.executors.run_directory import choose_seed, unsaved_seed
from vilmedic.loggers.contract import flat

if TYPE_CHECKING:
    from vilmedic.config.load import Config

UNTOLD = ("ckpt", "ckpt_dir", "name", "trainor.seed")
"""Keys that say where a run is rather than what it does."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Args:
        seed: the run's seed.
        path: the checkpoint to continue from; None at the very beginning.
        state: its contents.
        moved: it comes from another directory than the run's.
    """

    seed: int
    path: Path | None = None
    state: dict[str, Any] | None = None
    moved: bool = False

    @property
    def saved(self) -> dict[str, Any]:
        """The configuration of the checkpoint."""
        return {} if self.state is None else self.state["config"]


def find_start(config: Config) -> Start:
    """The checkpoint that `ckpt` names and its seed, or a new run with the seed given or drawn.

    Raises:
        CheckpointError: there is no such checkpoint, or training cannot continue from it.
        ConfigError: `trainor.seed` is that of another run, or the checkpoint comes from another
            directory and a run with its seed is already here.
    """
    wanted = config.trainor.seed
    if config.ckpt is None:
        return Start(choose_seed(config.run_dir, wanted))
    if config.ckpt == "auto":
        path = checkpoint.newest(config.run_dir, wanted)
        if path is None:
            LOGGER.info("ckpt=auto: nothing to continue in %s, a new run begins", config.run_dir)
            # One that was killed before its first save is begun again, not joined by another.
            begun = unsaved_seed(config.run_dir) if wanted is None else wanted
            return Start(choose_seed(config.run_dir, begun))
    else:
        path = checkpoint.locate(config.ckpt, config.run_dir, wanted)
    state = checkpoint.load_checkpoint(path)
    if "progress" not in state:
        raise CheckpointError(f"{path}: holds weights only, so training cannot continue.")
    if wanted not in (None, state["seed"]):
        raise ConfigError(
            f"trainor.seed: given {wanted}, but {path} continues a run with seed "
            f"{state['seed']}. Leave the key out."
        )
    moved = path.parent.resolve() != config.run_dir.resolve()
    if moved:
        choose_seed(config.run_dir, state["seed"])
    return Start(state["seed"], path, state, moved)


def agree_on_start(config: Config) -> Start:
    """What `find_start` gives in the main process, in every process."""
    if distributed.world_size() == 1:
        return find_start(config)
    found = find_start(config) if distributed.is_main() else None
    told: list[Any] = distributed.on_main(
        lambda: (
            [found.seed, None if found.path is None else str(found.path), found.moved]
            if found
            else []
        )
    )
    if found is not None:
        return found
    seed, path, moved = told
    if path is None:
        return Start(seed)
    return Start(seed, Path(path), checkpoint.load_checkpoint(Path(path)), moved)


def tell_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
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
    """Batches of this run that hold the samples which the epoch has seen.

    Args:
        batch: batches trained on when the checkpoint was written.
        saved: the configuration of then.
        batch_size: samples a batch now.
    """
    return batch * int(saved["trainor"]["batch_size"]) // batch_size
