"""Checkpoint files: crash-safe writing, names with the score, ranking."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilmedic.config.declared import known_better
from vilmedic.distributed.gather import like
from vilmedic.errors import CheckpointError, ConfigError, nearest
from vilmedic.files import no_file, replacing, sync_folder
from vilmedic.log import counted

NAME = re.compile(
    r"(?P<score>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)"
    r"_(?P<epoch>[0-9]+)_(?P<seed>[0-9]+)\.pth"
)
STATE_NAME = re.compile(
    r"(?P<kind>last|previous|state_(?P<step>0|[1-9][0-9]*))_(?P<seed>0|[1-9][0-9]*)\.pth"
)
FOR_TRAINING = ("optimizer", "schedule", "scale", "random", "random_of_others")
"""Keys that only a training state has, and a best checkpoint does not."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint file `<score>_<epoch>_<seed>.pth`, described by its contents.

    Args:
        path: the file.
        score: value of the metric that decided on improvement.
        epoch: the epoch after which it was written, counted from 0.
        seed: the seed of the run that wrote it.
        metric: that metric.
        better: `higher` or `lower`: which score is better.
    """

    path: Path
    score: float
    epoch: int
    seed: int
    metric: str
    better: str


def best_name(score: float, epoch: int, seed: int) -> str:
    """File name of a best checkpoint."""
    return f"{score!r}_{epoch}_{seed}.pth"


def last_name(seed: int) -> str:
    """File name of the newest state of a run."""
    return f"last_{seed}.pth"


def previous_name(seed: int) -> str:
    """File name of the previous state, to resume from if the newest is damaged."""
    return f"previous_{seed}.pth"


def state_name(step: int, seed: int) -> str:
    """File name of the state of an earlier end of an epoch, as `trainor.keep_states` keeps it."""
    return f"state_{step}_{seed}.pth"


def states(run_dir: Path, seed: int) -> list[Path]:
    """Return all states of a run, newest first: each can be resumed."""
    names = [run_dir / last_name(seed), run_dir / previous_name(seed)]
    return [path for path in names if path.exists()] + kept_states(run_dir, seed)


def kept_states(run_dir: Path, seed: int) -> list[Path]:
    """The files `state_<step>_<seed>.pth` of a run, the newest first."""
    found = [
        (int(match["step"]), path)
        for path in run_dir.glob(f"state_*_{seed}.pth")
        if (match := STATE_NAME.fullmatch(path.name)) is not None and int(match["seed"]) == seed
    ]
    return [path for _, path in sorted(found, reverse=True)]


def step_of(path: Path) -> int:
    """The optimizer step in the name of a file `state_<step>_<seed>.pth`."""
    match = STATE_NAME.fullmatch(path.name)
    assert match is not None
    return int(match["step"])


def weights_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a run without training state: weights and their description.

    Adapters of `lora` are merged into the weights of their layers.
    """
    from vilmedic.checkpoints.adapters import without_adapters

    kept = {key: value for key, value in state.items() if key not in FOR_TRAINING}
    return without_adapters(kept)


def can_continue(state: dict[str, Any]) -> bool:
    """Return whether the keys of a checkpoint allow training to continue from it."""
    return "progress" in state and "optimizer" in state


def newest_seed(run_dir: Path) -> int | None:
    """Return the seed of the run that was saved last; None without any."""
    found = [
        (path.stat().st_mtime_ns, int(match["seed"]))
        for path in run_dir.glob("*.pth")
        if (match := STATE_NAME.fullmatch(path.name)) is not None and path.exists()
    ]
    return max(found)[1] if found else None


def scored(run_dir: Path, seed: int | None = None) -> list[Path]:
    """Return the checkpoints of a run directory named by a score, of any seed or of one."""
    matches = [(path, NAME.fullmatch(path.name)) for path in sorted(run_dir.glob("*.pth"))]
    return [path for path, match in matches if match and seed in (None, int(match["seed"]))]


def epoch_of(path: Path) -> int:
    """The epoch in the name of a file that is named by a score."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match["epoch"])


def read_best(path: Path, metric: str = "validation_loss") -> BestCheckpoint:
    """Read the score of a checkpoint that is named by a score, without its weights.

    Args:
        path: the file.
        metric: the metric of files that do not name theirs, such as those of the original vilmedic.

    Raises:
        CheckpointError: it cannot be read, or the better direction of its metric is unknown.
    """
    return score_data(path, read_header(path), metric)


def score_data(
    path: Path, state: Mapping[str, Any], metric: str = "validation_loss"
) -> BestCheckpoint:
    """The score data of a checkpoint; see `read_best`.

    Args:
        path: the file, which is named by a score.
        state: what it holds.
        metric: see `read_best`.
    """
    match = NAME.fullmatch(path.name)
    assert match is not None
    score = state.get("score")
    # Files of the original vilmedic have it in their names only, and the metric in their settings.
    try:
        score = float(match["score"] if score is None else score)
        epoch, seed = (int(state.get(key) or match[key]) for key in ("epoch", "seed"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged: its score is not a number.") from error
    stated = state.get("metric") or _metric_of_settings(state.get("config"))
    if stated is None:
        logger.warning("%s does not name the metric of its score: taken as %s", path, metric)
    metric = stated or metric
    better = better_of({**state, "metric": metric})
    if better is None:
        raise CheckpointError(
            f"{path}: its score is {metric}, but it does not say whether higher or lower is "
            "better. Name the checkpoint to use: ckpt=<file>."
        )
    return BestCheckpoint(path, score, epoch, seed, metric, better)


def _metric_of_settings(config: Any) -> str | None:
    """Return the metric of the scores by the configuration in a file; None if it has none."""
    section = config.get("trainor") if isinstance(config, Mapping) else None
    metric = section.get("early_stop_metric") if isinstance(section, Mapping) else None
    return metric if isinstance(metric, str) else None


def better_of(state: Mapping[str, Any]) -> str | None:
    """Return whether `higher` or `lower` scores of a checkpoint are better.

    Older files do not store it: there the metric's name decides.

    Returns:
        None when the metric is not known.
    """
    better: str | None = state.get("better")
    return better or known_better(str(state.get("metric")))


def best_first(found: Iterable[BestCheckpoint]) -> list[BestCheckpoint]:
    """Checkpoints with scores of one metric, best first; equal ones by epoch, then by seed."""
    return sorted(
        found,
        key=lambda one: (one.score * (1 if one.better == "lower" else -1), one.epoch, one.seed),
    )


def find_checkpoints(
    run_dir: Path,
    mode: str,
    *,
    metric: str = "validation_loss",
    rank_by: str | None = None,
    remedy: str = "Say with ensemblor.rank_by which of them counts, or name a file with ckpt=",
) -> list[Path]:
    """The checkpoints that an evaluation uses, ranked by the score and direction in the files.

    Args:
        run_dir: the directory of the run.
        mode: `best-N` for the N best over all seeds, or `all`.
        metric: the metric of files that do not say theirs, unless `rank_by` is given.
        rank_by: the metric whose files count; None when there is only one.
        remedy: what to do about files of several metrics, for the message.

    Raises:
        ConfigError: the mode is none of these.
        CheckpointError: the run has no such checkpoint, or too few; or its files have scores of
            several metrics, and none is chosen.
    """
    match = re.fullmatch(r"all|best-([1-9]\d*)", mode)
    if match is None:
        raise ConfigError(f"ensemblor.mode: given '{mode}', allowed: best-1, best-N or all.")
    require_directory(run_dir)
    found = [read_best(path, rank_by or metric) for path in scored(run_dir)]
    if not found:
        lasts = sorted(path.name for path in run_dir.glob("last_*.pth"))
        hint = f" There is {', '.join(lasts)}: evaluate it with ckpt={lasts[0]}." if lasts else ""
        raise CheckpointError(f"{run_dir}: no checkpoint with a score in this directory.{hint}")
    ranked = best_first(_of_one_metric(found, run_dir, rank_by, remedy))
    if match[1] is None:
        return [one.path for one in ranked]
    wanted = int(match[1])
    if wanted > len(ranked):
        raise CheckpointError(
            f"{run_dir}: ensemblor.mode is '{mode}', but the directory holds "
            f"{counted(len(ranked), 'checkpoint')} with a score. Allowed: best-1 to "
            f"best-{len(ranked)}, or all."
        )
    return [one.path for one in ranked[:wanted]]


def _of_one_metric(
    found: list[BestCheckpoint], run_dir: Path, rank_by: str | None, remedy: str
) -> list[BestCheckpoint]:
    """The checkpoints whose scores can be compared."""
    groups: dict[tuple[str, str], list[BestCheckpoint]] = {}
    for one in found:
        if rank_by in (None, one.metric):
            groups.setdefault((one.metric, one.better), []).append(one)
    if not groups:
        metrics = sorted({one.metric for one in found})
        raise CheckpointError(
            f"ensemblor.rank_by: given '{rank_by}', but no checkpoint in {run_dir} has a score of "
            f"it. Allowed: {', '.join(metrics)}.{nearest(str(rank_by), metrics)}"
        )
    if len(groups) > 1:
        listed = "; ".join(
            f"{metric} ({better} is better): {', '.join(one.path.name for one in group)}"
            for (metric, better), group in sorted(groups.items())
        )
        raise CheckpointError(
            f"{run_dir}: holds checkpoints with scores of several metrics, which do not compare: "
            f"{listed}. {remedy}."
        )
    return next(iter(groups.values()))


def require_directory(run_dir: Path) -> None:
    """Raise a `CheckpointError` unless there is such a run directory."""
    if run_dir.is_dir():
        return
    folder = run_dir.parent
    runs = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    raise CheckpointError(
        f"{run_dir}: there is no such run directory (set by name and ckpt_dir). Train it first: "
        "bin/train.py with the same configuration and name."
        f"{nearest(run_dir.name, runs)}"
    )


def newest(run_dir: Path, seed: int | None = None) -> Path | None:
    """Return the newest state of a run, of any seed or of the one given; None without any."""
    found = [
        path
        for path in run_dir.glob("last_*.pth")
        if (match := STATE_NAME.fullmatch(path.name)) is not None
        and (seed is None or int(match["seed"]) == seed)
        and path.exists()
    ]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def locate(ckpt: str, run_dir: Path, seed: int | None = None) -> Path:
    """Return the file that `ckpt` names: a file of the run directory, a path, or `last`.

    A path may be an exported folder, or a folder of the original vilmedic's model zoo, with one
    .pth and config.yml.

    Args:
        ckpt: what the configuration says.
        run_dir: the directory of the run.
        seed: the seed whose newest state `last` means; None takes the newest of all.

    Raises:
        CheckpointError: there is no such file.
    """
    if ckpt == "last" and (path := newest(run_dir, seed)) is not None:
        return path
    from vilmedic.checkpoints.older_formats import zoo_file
    from vilmedic.manifest import is_export

    places = (run_dir / ckpt, Path(ckpt))
    for path in places:
        # not Path.is_file, which raises for invalid names
        if os.path.isfile(path) or is_export(path):
            return path
        if (inside := zoo_file(path)) is not None:
            return inside
    for path in places:
        if (kind := no_file(path)) is not None:
            raise CheckpointError(f"ckpt: {path} is {kind}, not a checkpoint.")
    require_directory(run_dir)
    there = sorted(path.name for path in run_dir.glob("*.pth"))
    raise CheckpointError(
        f"ckpt: there is no file '{ckpt}', neither as a path nor in {run_dir}, which holds "
        f"{', '.join(there) or 'no checkpoint'}.{nearest(ckpt, there)}"
    )


def save_checkpoint(
    state: dict[str, Any], path: Path, kept: tuple[Path, Path] | None = None
) -> None:
    """Write a checkpoint atomically: the file is either the old one or the complete new one.

    The state is written to a temporary file beside the target, flushed to the disk and renamed.

    Args:
        state: tensors and plain values only.
        path: the file to write.
        kept: an existing file, and an additional name that it gets before `path` is replaced.
    """
    with replacing(path) as draft:
        with open(draft, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if kept is not None:
            _keep(*kept, replaced=path)
    sync_folder(path.parent)


def link(source: Path, name: Path) -> bool:
    """Give a file an additional name by a hard link, replacing the file of that name.

    Returns:
        Whether that worked: it does not without the file or on file systems without hard links.
    """
    if name.exists() and name.samefile(source):
        return True
    draft = name.with_name(f".{name.name}.tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(source, draft)
        os.replace(draft, name)
    except OSError:
        draft.unlink(missing_ok=True)
        return False
    return True


def _keep(source: Path, name: Path, *, replaced: Path) -> None:
    """Give a file that will lose its name another one."""
    if source.is_file() and not link(source, name):
        if source == replaced:
            os.replace(source, name)
        else:
            name.unlink(missing_ok=True)  # older than what was to be kept


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; no code in the file is run.

    Files of the original vilmedic, of dalle-pytorch and of the official GLoRIA repository are
    converted to the format of this project. A file of the original's model zoo has its
    configuration in config.yml beside it, or is named by its folder. An exported folder counts as
    the checkpoint that it was made of, and a safetensors file as weights alone.

    Raises:
        CheckpointError: the file is missing, damaged, or holds other things than tensors and
            plain values.
    """
    # imported here, as below: a new run reads no checkpoint
    from vilmedic.checkpoints.exported import is_safetensors, load_safetensors, read_export
    from vilmedic.checkpoints.older_formats import unify, zoo_config, zoo_file
    from vilmedic.checkpoints.safe_load import load_plain
    from vilmedic.manifest import is_export

    path = zoo_file(path) or path
    if is_export(path):
        state = read_export(path)
    else:
        read = load_safetensors if is_safetensors(path) else load_plain
        state = unify(read(path), path)
    if not state.get("config") and (config := zoo_config(path)) is not None:
        state["config"] = config
    for key in ("config", "progress", "ema", "data", "networks", "vae"):
        if not isinstance(state.get(key), dict | None):
            what = type(state[key]).__name__
            raise CheckpointError(f"{path}: is damaged: its '{key}' is a {what}.")
    for name, config in (state.get("networks") or {}).items():
        if not (isinstance(name, str) and isinstance(config, dict)):
            raise CheckpointError(f"{path}: is damaged: its 'networks' hold other than settings.")
    if not all(isinstance(value, torch.Tensor) for value in (state.get("ema") or {}).values()):
        raise CheckpointError(f"{path}: is damaged: its averaged weights are not tensors.")
    return state


def read_header(path: Path) -> dict[str, Any]:
    """Read a checkpoint for its metadata, with tensors left on the disk.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    from vilmedic.checkpoints.older_formats import unify
    from vilmedic.checkpoints.safe_load import load_plain
    from vilmedic.manifest import is_export

    if is_export(path):
        return load_checkpoint(path)
    return unify(load_plain(path, mapped=True), path)


def load_weights(model: nn.Module, state: dict[str, Any], path: Path, *, ema: bool = False) -> None:
    """Load the weights of a checkpoint into a model.

    Adapters of `lora` are merged into the weights of their layers for a model without adapters.

    Args:
        model: the module to fill.
        state: the result of `load_checkpoint`.
        path: the file it came from, for the message.
        ema: take the averaged weights.

    Raises:
        CheckpointError: names or shapes differ (the first of each kind are listed), the file is
            of another model, or it holds no averaged weights.
    """
    if ema and not state.get("ema"):
        raise CheckpointError(
            f"{path}: holds no averaged weights, so ensemblor.ema cannot be true: the run was not "
            "trained with trainor.ema."
        )
    from vilmedic.checkpoints.adapters import has_adapters, without_adapters
    from vilmedic.checkpoints.older_formats import older_names

    own = model.state_dict()
    if not has_adapters(own):
        state = without_adapters(state, path)
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
    # into the model's own state, which keeps the versions that some networks need (MNASNet)
    own.update({key: like(given[key], value) for key, value in own.items()})
    model.load_state_dict(own)


def improves(score: float, best: float | None, better: str) -> bool:
    """Return whether a score beats the best one so far; nan and inf never do.

    Args:
        score: the score.
        best: the best one so far; None when there is none.
        better: `higher` or `lower`.
    """
    if not math.isfinite(score):
        return False
    if best is None:
        return True
    return score < best if better == "lower" else score > best
