"""Everything that a run is, as one dictionary, and a run that goes on from it exactly."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vilmedic import distributed
from vilmedic.blocks.pretrained import network_configs
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import CheckpointError
from vilmedic.executors import checkpoint, resume
from vilmedic.executors.log import LOGGER
from vilmedic.executors.optimization import Schedule, restore_optimizer, schedule_options
from vilmedic.executors.parallel import whole
from vilmedic.executors.progress import Progress
from vilmedic.executors.random_state import random_state, restore_random_state

if TYPE_CHECKING:
    from vilmedic.executors.trainor import Trainor


def capture(run: Trainor, score: float | None) -> dict[str, Any]:
    """The state of a run between two steps: tensors and plain values, not copied.

    All processes take part; whole is what the main one gets.

    Args:
        run: the run.
        score: the score of the evaluation that led to this; None when it was not the best.
    """
    run.progress.lines, run.progress.tally = run.log.lines, run.tally.read()
    finished = run.progress.epoch - (run.progress.batch == 0)
    random, *others = distributed.gather(random_state())
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
    _restore_optimizer(run, state, start)
    if start.saved["trainor"]["precision"] == run.section.precision:
        run.step.scale.load_state_dict(state["scale"])
    if run.ema is not None and state["ema"] is not None:
        run.ema.load_state_dict(state["ema"])
    if run.progress.step:
        run.model.schedule(run.progress.step)  # an evaluation may be what comes first
    states = [state["random"], *state.get("random_of_others", [])]
    if distributed.rank() < len(states):
        restore_random_state(states[distributed.rank()])


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
    try:
        restore_optimizer(run.optimizer, state["optimizer"], saved["optim_params"], now)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{start.path}: optimizer state does not fit: {error}") from error
    if schedule_options(saved) == schedule_options(asdict(now)):
        # A plateau of another score is none of this one; the learning rate stays where it is.
        same = (state["metric"], checkpoint.better_of(state)) == (now.early_stop_metric, run.better)
        if same or not run.schedule.on_plateau:
            run.schedule.load_state_dict(state["schedule"])
        return
    LOGGER.warning("trainor.lr_decay or its options have changed: the schedule starts anew")
    _start_schedule_anew(run)


def _start_schedule_anew(run: Trainor) -> None:
    """A schedule over the steps that are left."""
    for group in run.optimizer.param_groups:
        group.pop("initial_lr", None)
        group["lr"] = run.optimizer.defaults["lr"]
    run.schedule = Schedule(run.optimizer, run.section, run.steps_left(), better=run.better)
