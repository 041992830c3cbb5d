"""Everything that a run is, as one dictionary, and a run that goes on from it exactly."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from vilmedic.blocks.pretrained import network_configs
from vilmedic.checkpoints import checkpoint
from vilmedic.config.sections import TrainorSection
from vilmedic.distributed import processes
from vilmedic.errors import CheckpointError
from vilmedic.log import LOGGER
from vilmedic.random_state import random_state, restore_random_state
from vilmedic.training import resume
from vilmedic.training.optimization import Schedule, restore_optimizer, schedule_options
from vilmedic.training.parallel import whole
from vilmedic.training.progress import Progress

if TYPE_CHECKING:
    from vilmedic.training.trainor import Trainor


AS_WEIGHTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg"}
"""What optimizers keep in the shape of the weights."""


def capture(run: Trainor, score: float | None) -> dict[str, Any]:
    """The state of a run between two steps: tensors and plain values, not copied.

    All processes take part; whole is what the main one gets.

    Args:
        run: the run.
        score: the score of the evaluation that led to this; None when it was not the best.
    """
    run.progress.lines, run.progress.tally = run.log.lines, run.tally.read()
    finished = run.progress.epoch - (run.progress.batch == 0)
    random, *others = processes.gather(random_state())
    return {
        "model": whole(run.model.state_dict()),
        "ema": None if run.ema is None else whole(run.ema.state_dict()),
        "optimizer": whole(run.optimizer.state_dict()),
        "schedule": run.schedule.state_dict(),
        "scale": run.step.scale.state_dict(),
        "random": random,
        "random_of_others": others,
        "progress": asdict(run.progress),
        "metric": run.section.early_stop_metric,
        "better": run.better,
        "score": score,
        "epoch": finished,
        "seed": run.seed,
        "config": run.config.data,
        "data": run.data.spec.to_plain(),
        "networks": network_configs(run.model),
    }


def restore_weights(run: Trainor, start: resume.Start) -> None:
    """Give a model that was just built the weights of a checkpoint.

    Before anything is made of the model: tokens of images, say, or an average of its weights.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    if start.state is None or start.path is None:
        return
    LOGGER.info("Continuing %s after step %d", start.path, start.state["progress"]["step"])
    resume.tell_changes(start.saved, run.config.data)
    checkpoint.load_weights(run.model, start.state, start.path)


def restore(run: Trainor, start: resume.Start) -> None:
    """Make a run that has its weights go on where their checkpoint was written.

    What the configuration changes takes effect: another batch size goes on behind the samples
    that were seen, other optimizer options are set, and another optimizer or schedule starts anew.

    Raises:
        CheckpointError: the state of the optimizer does not fit.
    """
    state = start.state
    if state is None:
        return
    with resume.restoring(start.path):
        _restore_optimizer(run, state, start)
        if start.saved["trainor"]["precision"] == run.section.precision:
            run.step.scale.load_state_dict(state["scale"])
        if run.ema is not None and state["ema"] is not None:
            run.ema.load_state_dict(state["ema"])
        if run.progress.step:
            run.model.schedule(run.progress.step)  # an evaluation may be what comes first
        states = [state["random"], *state.get("random_of_others", [])]
        if processes.rank() < len(states):
            restore_random_state(states[processes.rank()])


def restore_progress(start: resume.Start, section: TrainorSection, better: str) -> Progress:
    """How far the run has come, in batches of now, with the best score that still counts.

    Checkpoints of another directory were not the best ones of this, and scores of another metric
    cannot be compared: then nothing has been the best yet.

    Args:
        start: what the run continues from.
        section: how it is trained from now on.
        better: `higher` or `lower`, whatever is better of its score.
    """
    state, path = start.state, start.path
    if state is None or path is None:
        return Progress()
    with resume.restoring(path):
        progress = Progress(**state["progress"])
        progress.batch = resume.position(progress.batch, start.saved, section.batch_size)
        before = (state["metric"], checkpoint.better_of(state))
        changed = before != (section.early_stop_metric, better)
    if changed:
        LOGGER.warning(
            "trainor.early_stop_metric has changed: what was the best by %s (%s is better) no "
            "longer counts",
            *before,
        )
    if changed or start.moved:
        progress.best, progress.stale = None, 0
    return progress


def _restore_optimizer(run: Trainor, state: dict[str, Any], start: resume.Start) -> None:
    saved, now = start.saved["trainor"], run.section
    if saved["optimizer"] != now.optimizer:
        LOGGER.warning("trainor.optimizer has changed: optimizer and schedule start anew")
        _start_schedule_anew(run)
        return
    fresh = [dict(group) for group in run.optimizer.param_groups]
    try:
        restore_optimizer(run.optimizer, state["optimizer"], saved["optim_params"], now)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{start.path}: optimizer state does not fit: {error}") from error
    _check_optimizer(run.optimizer, fresh, start)
    if schedule_options(saved) == schedule_options(asdict(now)):
        # A plateau of another score is none of this one; the learning rate stays where it is.
        same = (state["metric"], checkpoint.better_of(state)) == (now.early_stop_metric, run.better)
        if same or not run.schedule.on_plateau:
            if not _alike(state["schedule"], run.schedule.state_dict()):
                raise CheckpointError(f"{start.path}: the state of the schedule is damaged.")
            run.schedule.load_state_dict(state["schedule"])
        return
    LOGGER.warning("trainor.lr_decay or its options have changed: the schedule starts anew")
    _start_schedule_anew(run)


def _check_optimizer(
    optimizer: Optimizer, fresh: list[dict[str, Any]], start: resume.Start
) -> None:
    """Hold the restored state of an optimizer to what its next step needs.

    Args:
        optimizer: with the state of a checkpoint.
        fresh: its groups as they were made.
        start: where the state comes from.

    Raises:
        CheckpointError: an option is of another kind, or moments do not fit their weights.
    """
    for group, own in zip(optimizer.param_groups, fresh, strict=True):
        for name in group.keys() - {"params"}:
            value, made = group[name], own.get(name)
            if name not in own:  # added by a schedule
                fits = value is None or isinstance(value, int | float)
            elif made is None or isinstance(made, bool):
                fits = value is made
            else:
                fits = _alike(value, made)
            if not fits:
                raise CheckpointError(f"{start.path}: the optimizer's '{name}' in it is damaged.")
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            wanted = parameter.shape if name in AS_WEIGHTS else ()
            if value is None and name == "momentum_buffer":  # before its first step
                continue
            if name in AS_WEIGHTS or name == "step":
                shape = value.shape if isinstance(value, Tensor) else ()
                if shape != wanted or not isinstance(value, Tensor | float | int):
                    raise CheckpointError(
                        f"{start.path}: optimizer state does not fit: {name} is {tuple(shape)}, "
                        f"wanted is {tuple(wanted)}."
                    )


def _alike(given: Any, own: Any) -> bool:
    """Whether a value is of the kind of another, and a list as long."""
    if isinstance(own, dict):  # other versions of torch may keep more or less
        return isinstance(given, dict) and all(
            _alike(given[key], value) for key, value in own.items() if key in given
        )
    if isinstance(own, list | tuple):
        return (
            isinstance(given, list | tuple)
            and len(given) == len(own)
            and all(map(_alike, given, own))
        )
    if isinstance(own, int | float) and not isinstance(own, bool):
        return isinstance(given, int | float) and not isinstance(given, bool)
    return own is None or isinstance(given, type(own))


def _start_schedule_anew(run: Trainor) -> None:
    """A schedule over the steps that are left."""
    for group in run.optimizer.param_groups:
        group.pop("initial_lr", None)
        group["lr"] = run.optimizer.defaults["lr"]
    run.schedule = Schedule(run.optimizer, run.section, run.steps_left(), better=run.better)
