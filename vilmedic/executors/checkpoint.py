"""Checkpoints: written so that a crash never loses one, named by score, ranked by number."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilmedic.errors import CheckpointError, ConfigError, nearest
from vilmedic.executors.older_formats import older_names, unify
from vilmedic.executors.parallel import like
from vilmedic.executors.safe_load import load_plain
from vilmedic.executors.score import lower_is_better

NAME = re.compile(r"^(?P<score>[-+]?[0-9.]+(?:e[-+]?[0-9]+)?)_(?P<epoch>\d+)_(?P<seed>\d+)\.pth$")


@dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint file `<score>_<epoch>_<seed>.pth`.

    Args:
        path: the file.
        score: value of the metric that decided on improvement.
        epoch: the epoch after which it was written, counted from 0.
        seed: the seed of the run that wrote it.
    """

    path: Path
    score: float
    epoch: int
    seed: int


def best_name(score: float, epoch: int, seed: int) -> str:
    """File name of a checkpoint that improved on all before it."""
    return f"{score!r}_{epoch}_{seed}.pth"


def last_name(seed: int) -> str:
    """File name of the newest state of a run."""
    return f"last_{seed}.pth"


def list_best(run_dir: Path, metric: str) -> list[BestCheckpoint]:
    """All checkpoints of a run directory that carry a score, best first, over all seeds.

    Args:
        run_dir: the directory of the run.
        metric: the score's name, which tells its direction.

    Returns:
        The checkpoints ranked by the number in their name; equal scores by epoch, then by seed.
    """
    matches = [(path, NAME.match(path.name)) for path in run_dir.glob("*.pth")]
    found = [
        BestCheckpoint(path, float(match["score"]), int(match["epoch"]), int(match["seed"]))
        for path, match in matches
        if match is not None
    ]
    sign = 1.0 if lower_is_better(metric) else -1.0
    return sorted(found, key=lambda best: (sign * best.score, best.epoch, best.seed))


def find_checkpoints(run_dir: Path, mode: str, metric: str) -> list[Path]:
    """The checkpoints that an evaluation uses.

    Args:
        run_dir: the directory of the run.
        mode: `best-N` for the N best over all seeds, or `all`.
        metric: the score's name, which tells its direction.

    Raises:
        ConfigError: the mode is none of these.
        CheckpointError: the run has no such checkpoint, or fewer than asked for.
    """
    match = re.fullmatch(r"all|best-([1-9]\d*)", mode)
    if match is None:
        raise ConfigError(f"ensemblor.mode: given '{mode}', allowed: best-1, best-N or all.")
    ranked = [best.path for best in list_best(run_dir, metric)]
    if not ranked:
        lasts = sorted(path.name for path in run_dir.glob("last_*.pth"))
        remedy = f" There is {', '.join(lasts)}: evaluate it with ckpt={lasts[0]}." if lasts else ""
        raise CheckpointError(f"{run_dir}: no checkpoint with a score in this directory.{remedy}")
    if match[1] is None:
        return ranked
    wanted = int(match[1])
    if wanted > len(ranked):
        raise CheckpointError(
            f"{run_dir}: ensemblor.mode is '{mode}', but the directory holds {len(ranked)} "
            f"checkpoints with a score. Allowed: best-1 to best-{len(ranked)}, or all."
        )
    return ranked[:wanted]


def newest(run_dir: Path, seed: int | None = None) -> Path | None:
    """The newest state that a run left, of any seed or of the one given; None without any."""
    names = "last_*.pth" if seed is None else last_name(seed)
    return max(run_dir.glob(names), key=lambda path: path.stat().st_mtime_ns, default=None)


def locate(ckpt: str, run_dir: Path, seed: int | None = None) -> Path:
    """The file that `ckpt` names: a file of the run directory, a path, or `last`.

    Args:
        ckpt: what the configuration says.
        run_dir: the directory of the run.
        seed: the seed whose newest state `last` means; None takes the newest of all.

    Raises:
        CheckpointError: there is no such file.
    """
    if ckpt == "last" and (path := newest(run_dir, seed)) is not None:
        return path
    for path in (run_dir / ckpt, Path(ckpt)):
        if path.is_file():
            return path
    there = sorted(path.name for path in run_dir.glob("*.pth"))
    raise CheckpointError(
        f"ckpt: there is no file '{ckpt}', neither as a path nor in {run_dir}, which holds "
        f"{', '.join(there) or 'no checkpoint'}.{nearest(ckpt, there)}"
    )


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the file is either the old one or the whole new one.

    The state goes to a temporary file beside the target, is flushed to the disk and renamed.

    Args:
        state: tensors and plain values only.
        path: the file to write.
    """
    # One name for all attempts: what a killed one has left is overwritten by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is run as code.

    Files of the original vilmedic and of dalle-pytorch are brought into the shape of this project.

    Raises:
        CheckpointError: the file is missing, cut short, or holds other things than tensors and
            plain values.
    """
    return unify(load_plain(path), path)


def load_weights(model: nn.Module, state: dict[str, Any], path: Path, *, ema: bool = False) -> None:
    """Put the weights of a checkpoint into a model.

    Args:
        model: the module to fill.
        state: what `load_checkpoint` returned.
        path: the file it came from, for the message.
        ema: take the averaged weights.

    Raises:
        CheckpointError: names or shapes differ; lists the first of each kind. Or the file says that
            it is of another model, or holds no averaged weights.
    """
    if ema and not state.get("ema"):
        raise CheckpointError(
            f"{path}: holds no averaged weights, so ensemblor.ema cannot be true: the run was not "
            "trained with trainor.ema."
        )
    own = model.state_dict()
    prefixes: Any = getattr(model, "prefixes", ("",))
    given = older_names(state["ema" if ema else "model"], list(own), prefixes)
    translate: Any = getattr(model, "translate", None)
    if translate is not None:
        given = older_names(translate(given), list(own), prefixes)
    differences: Any = getattr(model, "differences", None)
    if differences is not None and (found := differences(given, state.get("config"))):
        raise CheckpointError(
            f"{path}: is of another model than this configuration describes: {'; '.join(found)}."
        )
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(given[key].shape)}, the model wants {tuple(own[key].shape)}"
        for key in sorted(own.keys() & given.keys())
        if own[key].shape != given[key].shape
    ]
    complaints = [
        f"{what} ({len(keys)}): {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for what, keys in (
            ("weights that the file lacks", missing),
            ("weights that the model does not have", unexpected),
            ("other shapes", shapes),
        )
        if keys
    ]
    if complaints:
        raise CheckpointError(
            f"{path}: does not fit the model of this configuration. " + "; ".join(complaints) + "."
        )
    model.load_state_dict({key: like(given[key], value) for key, value in own.items()})
