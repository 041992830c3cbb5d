"""Training state in a checkpoint, and exact resumption from it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from vilmedic.blocks.pretrained import network_configs
from vilmedic.checkpoints import checkpoint
from vilmedic.datasets.aligned import DataSpec
from vilmedic.device import random_state, restore_random_state
from vilmedic.distributed import processes
from vilmedic.distributed.gather import copy_from_main, whole
from vilmedic.errors import CheckpointError
from vilmedic.log import LOGGER
from vilmedic.models.contract import Model
from vilmedic.training import resume
from vilmedic.training.optimization import SCALE, Schedule, restore_optimizer, schedule_options
from vilmedic.training.step import Tally, TrainingStep

if TYPE_CHECKING:
    from vilmedic.config.load import Config
    from vilmedic.training.averaged_weights import AveragedWeights

AS_WEIGHTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg"}
"""Optimizer states that have the shape of the weights."""


class TrainState:
    """Everything that training changes: the state of a run between two steps.

    Args:
        config: the checked configuration.
        start: what the run resumes from.
        step: takes the steps; it has the model, the optimizer and the loss scale.
        spec: data properties: tokenizer, label names, normalisation.
        batches: batches of an epoch.
        better: `higher` or `lower`: which score is better for ranking checkpoints.

    Attributes:
        progress: how far the run has come.
        schedule: the schedule of the learning rate.
        ema: the averaged weights, if any.
        tally: what the epoch adds up to.

    Raises:
        ConfigError: the schedule does not fit the run.
        CheckpointError: what the checkpoint says of its progress cannot be used.
    """

    def __init__(
        self,
        config: Config,
        start: resume.Start,
        step: TrainingStep,
        *,
        spec: DataSpec,
        batches: int,
        better: str,
    ) -> None:
        self.seed, self.better = start.seed, better
        self._config, self._section, self._spec = config, config.trainor, spec
        self._step, self._batches = step, batches
        self.model, self.optimizer = step.model, step.optimizer
        self.progress = self._progress(start)
        self.schedule = self._new_schedule(self.progress.step + self.steps_left())
        decay = self._section.ema
        self.ema: AveragedWeights | None = None
        if decay is not None:
            from vilmedic.training.averaged_weights import AveragedWeights

            self.ema = AveragedWeights(self.model, decay)
        self.tally = Tally(step.device, self.progress.tally)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self._batches / self._section.grad_accu)

    @property
    def epochs(self) -> int:
        """Epochs of the run, the last of which may be a part of one."""
        steps = self._section.steps
        return self._section.epochs if steps is None else math.ceil(steps / self.steps_per_epoch)

    def steps_left(self) -> int:
        """Optimizer steps from here to the end of the run."""
        if self._section.steps is not None:
            return max(0, self._section.steps - self.progress.step)
        further = self._section.epochs - self.progress.epoch - 1
        rest = math.ceil((self._batches - self.progress.batch) / self._section.grad_accu)
        return max(0, rest + further * self.steps_per_epoch)

    def share_buffers(self) -> None:
        """Make running statistics, averaged ones as well, those of the main process everywhere.

        Training reads none of them, so this is for an evaluation or a checkpoint.
        """
        self._step.parallel.share_buffers()
        if self.ema is not None and processes.world_size() > 1:
            copy_from_main(self.ema.buffers())

    def capture(self, score: float | None, lines: int) -> dict[str, Any]:
        """Return the state between two steps: tensors and plain values, not copied.

        All processes take part; the main one gets the whole state.

        Args:
            score: the score of the evaluation that led to this; None when it was not the best.
            lines: lines written to metrics.jsonl.
        """
        self.share_buffers()
        self.progress.lines, self.progress.tally = lines, self.tally.read()
        # Between two epochs `progress` is already at the start of the next one.
        finished = self.progress.epoch - (self.progress.batch == 0)
        # Dropout draws from a generator of each process. Data need no state: samples and their
        # augmentation follow from seed, epoch and line, so the position in `progress` is enough.
        random, *others = processes.gather(random_state())
        return {
            "model": whole(self.model.state_dict()),
            "ema": None if self.ema is None else whole(self.ema.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "scale": self._step.scale.state_dict(),
            "random": random,
            "random_of_others": others,
            "progress": asdict(self.progress),
            "metric": self._section.early_stop_metric,
            "better": self.better,
            "score": score,
            "epoch": finished,
            "seed": self.seed,
            "config": self._config.data,
            "data": self._spec.to_plain(),
            "networks": network_configs(self.model),
            "vae": self.model.stated_vae(),
        }

    def restore(self, start: resume.Start) -> None:
        """Resume from a checkpoint whose weights the model already has.

        Changes of the configuration take effect: with another batch size training continues after
        the samples already seen, optimizer options are updated, and another optimizer or schedule
        starts from the beginning.

        Raises:
            CheckpointError: the state of the optimizer does not fit.
        """
        state = start.state
        if state is None:
            return
        with resume.restoring(start.path):
            self._restore_optimizer(state, start)
            # A loss scale belongs to its precision: one of fp16 would be wrong for another.
            if start.saved["trainor"]["precision"] == self._section.precision:
                self._step.scale.load_state_dict(state["scale"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
            if self.progress.step:
                self.model.schedule(self.progress.step)  # for an evaluation before it
            # Last, so that nothing else draws from the restored generators. If there are more
            # processes than the checkpoint had, the additional ones keep their own state.
            states = [state["random"], *state.get("random_of_others", [])]
            if processes.rank() < len(states):
                restore_random_state(states[processes.rank()])

    def _progress(self, start: resume.Start) -> resume.Progress:
        """Return the progress in current batches, and the best score if it still counts.

        Best checkpoints of another directory do not belong to this run, and scores of another
        metric cannot be compared: in both cases there is no best score yet.
        """
        state, path, section = start.state, start.path, self._section
        if state is None or path is None:
            return resume.Progress()
        with resume.restoring(path):
            progress = resume.Progress(**state["progress"])
            progress.batch = resume.position(progress.batch, start.saved, section.batch_size)
            before = (state["metric"], checkpoint.better_of(state))
            changed = before != (section.early_stop_metric, self.better)
        if changed:
            LOGGER.warning(
                "trainor.early_stop_metric has changed: what was the best by %s (%s is better) no "
                "longer counts",
                *before,
            )
        if changed or start.moved:
            progress.best, progress.stale = None, 0
        return progress

    def _restore_optimizer(self, state: dict[str, Any], start: resume.Start) -> None:
        saved, now = start.saved["trainor"], self._section
        if saved["optimizer"] != now.optimizer:
            LOGGER.warning(
                "trainor.optimizer has changed: optimizer and schedule start from the beginning"
            )
            self._restart_schedule()
            return
        if (saved.get("optim_groups") or {}) != now.optim_groups:
            LOGGER.warning(
                "trainor.optim_groups has changed: optimizer and schedule start from the beginning"
            )
            self._restart_schedule()
            return
        fresh = [dict(group) for group in self.optimizer.param_groups]
        try:
            restore_optimizer(self.optimizer, state["optimizer"], saved["optim_params"], now)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{start.path}: optimizer state does not fit: {error}") from error
        _check_optimizer(self.optimizer, fresh, start)
        if schedule_options(saved) == schedule_options(asdict(now)):
            # The plateau of another score does not carry over; the learning rate stays as it is.
            before = (state["metric"], checkpoint.better_of(state))
            same = before == (now.early_stop_metric, self.better)
            if same or not self.schedule.on_plateau:
                if not _alike(state["schedule"], self.schedule.state_dict()):
                    raise CheckpointError(f"{start.path}: the state of the schedule is damaged.")
                self.schedule.load_state_dict(state["schedule"])
            return
        LOGGER.warning(
            "trainor.lr_decay or its options have changed: the schedule starts from the beginning"
        )
        self._restart_schedule()

    def _restart_schedule(self) -> None:
        """Return a schedule over the remaining steps."""
        for group in self.optimizer.param_groups:
            group.pop("initial_lr", None)
            group["lr"] = self.optimizer.defaults["lr"] * group.get(SCALE, 1.0)
        self.schedule = self._new_schedule(self.steps_left())

    def _new_schedule(self, steps: int) -> Schedule:
        return Schedule(self.optimizer, self._section, steps, better=self.better)


def restore_weights(model: Model, start: resume.Start, config: dict[str, Any]) -> None:
    """Load the weights of a checkpoint into a newly built model.

    To be called before anything is computed from the weights, such as image tokens or averages.

    Args:
        model: the model.
        start: what the run resumes from.
        config: the configuration of now, whose changes are logged.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    if start.state is None or start.path is None:
        return
    LOGGER.info("Continuing %s after step %d", start.path, start.state["progress"]["step"])
    resume.log_changes(start.saved, config)
    from vilmedic.checkpoints.adapters import has_adapters

    had, has = (has_adapters(one) for one in (start.state["model"], model.state_dict()))
    if had != has:
        raise CheckpointError(
            f"{start.path}: was trained {'with' if had else 'without'} lora, and the configuration "
            f"{'has it' if has else 'does not have it'}. Leave lora as it was, or start a new run "
            f"from these weights: model.encoder.pretrained or model.cnn.pretrained={start.path}."
        )
    checkpoint.load_weights(model, start.state, start.path)


def _check_optimizer(
    optimizer: Optimizer, fresh: list[dict[str, Any]], start: resume.Start
) -> None:
    """Check that the restored optimizer state fits the next step.

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
    """Return whether a value has the type of another, and a list its length."""
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
