"""Optimizer and learning-rate schedule from a configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer, lr_scheduler

from vilmedic.config.namespaces import OWN
from vilmedic.config.sections import TrainorSection
from vilmedic.config.types import AtLeast, Below, Between
from vilmedic.distributed.gather import like
from vilmedic.errors import ConfigError
from vilmedic.log import counted
from vilmedic.models.contract import Model
from vilmedic.registry import import_class

PER_EPOCH = ("StepLR", "MultiStepLR", "ExponentialLR")
FUSED_WHEN_SHARDED = (torch.optim.Adam, torch.optim.AdamW)
"""Fused optimizers of torch that support sharded weights."""
KERNELS = {"fused", "foreach", "capturable", "differentiable"}
"""Optimizer options with which a configuration chooses the implementation itself."""
LENGTH_ARGUMENTS = ("T_max", "total_steps")
"""Arguments of torch's schedulers that mean the length of the run, filled in when left out."""
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Learning-rate keys of a parameter group: the current rate, and those of schedulers."""
SCALE = "lr_scale"
"""Key of a parameter group: its learning rate as a multiple of `trainor.optim_params.lr`."""
GROUP, REST, OWN_DECAY = "group", "the rest", "own_decay"
"""Keys of a group of `trainor.optim_groups`: its entries, and whether it sets a decay."""
LENGTH_STATE = (*LENGTH_ARGUMENTS, "_schedule_phases")
"""Keys that a scheduler keeps there."""


def make_optimizer(model: nn.Module, section: TrainorSection) -> Optimizer:
    """Make the optimizer `section.optimizer` for the trainable parameters, fused if possible.

    Raises:
        ConfigError: torch refuses an option, or no parameter is left to train.
    """
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("model: every parameter is frozen, so there is nothing to train.")
    cls = named_class("torch.optim", section.optimizer)
    options = dict(section.optim_params)
    on_cpu = parameters[0].device.type == "cpu"
    if cls is torch.optim.RAdam and not on_cpu and not options.keys() & KERNELS:
        from vilmedic.training.radam import RAdam

        cls = RAdam
    base = options.get("lr", _default_rate(cls))
    if isinstance(model, Model) and base and (groups := model.learning_rates(base)):
        if section.optim_groups:
            raise ConfigError(
                "trainor.optim_groups: the model has rates of its own (model.encoder_lr, head_lr, "
                "layer_decay). Set them in one place."
            )
        parameters = [{"params": some, "lr": rate, SCALE: rate / base} for some, rate in groups]
    elif section.optim_groups:
        parameters = parameter_groups(model, section.optim_groups, base)
    if _can_be_fused(cls, parameters, options):
        options["fused"] = True
    try:
        return cls(parameters, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainor.optim_params ({section.optimizer}): {error}") from error


def parameter_groups(
    model: nn.Module, wanted: dict[str, dict[str, float]], base: float
) -> list[dict[str, Any]]:
    """Return the trainable weights in groups with the same options.

    Args:
        model: the model.
        wanted: `trainor.optim_groups`.
        base: the learning rate of weights in no group.

    Raises:
        ConfigError: an entry names no weight that is trained, or asks for a decay over the layers
            of something that has none.
    """
    found: dict[Any, dict[str, Any]] = {}
    used = dict.fromkeys(wanted, 0)
    depths = {key: _depths(model, key) for key, one in wanted.items() if "layer_decay" in one}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        keys = [key for key in wanted if _is_named(name, key)]
        options: dict[str, float] = {}
        depth = 0
        for key in keys:
            used[key] += 1
            options |= wanted[key]
            depth = depths[key][id(parameter)] if key in depths else depth
        factor = options.get("layer_decay", 1.0) ** depth
        rate = options.get("lr", base) * factor
        own: dict[str, Any] = {"lr": rate, SCALE: rate / base, GROUP: ", ".join(keys) or REST}
        if "weight_decay" in options:
            own |= {"weight_decay": options["weight_decay"], OWN_DECAY: True}
        group = found.setdefault((*keys, depth if factor < 1 else 0), {"params": [], **own})
        group["params"].append(parameter)
    if idle := [key for key, count in used.items() if not count]:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(
            f"trainor.optim_groups.{key}: no weight that is trained has such a name. Parts of the "
            f"model: {parts}."
            for key in idle
        )
    return list(found.values())


def common_rate(optimizer: Optimizer) -> float:
    """Return the scheduled value of `trainor.optim_params.lr`, independent of group rates."""
    groups = optimizer.param_groups
    whole = [group["lr"] for group in groups if group.get(SCALE, 1.0) == 1.0]
    return float(whole[0] if whole else groups[0]["lr"] / groups[0][SCALE])


def described_groups(optimizer: Optimizer) -> Iterator[str]:
    """A line for each entry of `trainor.optim_groups`, and for the rest: weights and rates."""
    named: dict[str, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        if GROUP in group:
            named.setdefault(group[GROUP], []).append(group)
    for name, groups in named.items():
        weights = sum(p.numel() for group in groups for p in group["params"])
        rates = sorted({group.get("initial_lr", group["lr"]) for group in groups})
        shown = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
        decay = groups[0].get("weight_decay")
        yield (
            f"Rates: {name}, {counted(weights, 'weight')} at {shown}"
            f"{f' in {len(rates)} steps' if len(rates) > 1 else ''}"
            f"{f', weight decay {decay:.3g}' if decay is not None else ''}"
        )


def _is_named(name: str, key: str) -> bool:
    """Return whether a key matches a weight: by its name, a parent module, or a pattern."""
    return name == key or name.startswith(f"{key}.") or fnmatchcase(name, key)


def _depths(model: nn.Module, key: str) -> dict[int, int]:
    """For each weight of a part the number of its layer, counted from the last one."""
    # imported here: runs without groups do not need it
    from vilmedic.blocks.repeated import HEAD, layers_of
    from vilmedic.blocks.vision import VisionEncoder

    part = dict(model.named_modules()).get(key)
    blocks: list[list[nn.Parameter]] = []
    if isinstance(part, VisionEncoder):
        blocks = part.parameters_by_block()
    elif part is not None:
        layers = layers_of(part)
        blocks = [list(layer.parameters.values()) for layer in layers]
        if len(layers) > 1 and layers[-1].name == HEAD:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    if len(blocks) < 2:
        raise ConfigError(
            f"trainor.optim_groups.{key}.layer_decay: there are no layers under that name that "
            "follow on each other. Allowed: the name of an encoder."
        )
    return {id(p): depth for depth, block in enumerate(reversed(blocks)) for p in block}


def named_class(namespace: str, name: str) -> Any:
    """The class that a configuration names, of torch or of this package."""
    if (own := OWN[namespace].get(name)) is not None:
        module, _, attribute = own.rpartition(".")
        return import_class(f"{module}:{attribute}", name)
    return getattr(lr_scheduler if namespace.endswith("lr_scheduler") else torch.optim, name)


def skips_by_itself(optimizer: Optimizer, device: torch.device) -> bool:
    """Return whether the update reads on the device that it should be skipped (`found_inf`).

    On a CPU reading costs nothing, and SGD with momentum is told before: a first step that its
    update skips would leave momentum in uninitialised memory.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    groups = [group for group in optimizer.param_groups if group.get("momentum")]
    return not groups or (
        device.type != "cpu" and not any(group.get("dampening") for group in groups)
    )


def start_momentum(optimizer: Optimizer) -> None:
    """Momentum of zero for weights that have none yet: then a first step may be left out."""
    for group in optimizer.param_groups:
        if not group.get("momentum"):
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter] if parameter.grad is not None else None
            if state is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def restore_optimizer(
    optimizer: Optimizer, state: dict[str, Any], saved: dict[str, Any], section: TrainorSection
) -> None:
    """Continue with the state of a checkpoint, and with the options of this configuration.

    Args:
        optimizer: made by `make_optimizer` for `section`.
        state: what its `state_dict` gave then.
        saved: the options `optim_params` of then; those that differ now, torch's defaults for what
            is left out, are set to what they are now, the learning rate in proportion where a
            schedule has changed it.
        section: the section of now.

    Raises:
        ValueError: the state is that of other parameters.
    """
    kept = ("fused", "foreach")
    choices = [{key: group.get(key) for key in kept} for group in optimizer.param_groups]
    scales = [group.get(SCALE, 1.0) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        moments.update({name: like(value, parameter) for name, value in moments.items()})
    changed = _changed_options(optimizer, saved, section.optim_params)
    for group, choice, scale in zip(optimizer.param_groups, choices, scales, strict=True):
        group.update({key: value for key, value in choice.items() if key in group})
        if SCALE in group and group[SCALE] != scale:
            for rate in RATES:
                if rate in group:
                    group[rate] = group[rate] / group[SCALE] * scale
            group[SCALE] = scale
        for key, (old, new) in changed.items():
            if key == "lr":
                if "max_lr" in section.lr_decay_params:
                    continue  # the rate is the schedule's own
                for rate in RATES:
                    if rate in group:
                        group[rate] = group[rate] * (new / old) if old else new * scale
            elif (
                key in group
                and key not in kept
                and not (key == "weight_decay" and group.get(OWN_DECAY))
            ):
                group[key] = new


def schedule_options(trainor: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """A schedule and its options, in which a `max_lr` that is the optimizer's rate is left out.

    Args:
        trainor: the section, of a checkpoint or of now.
    """
    options, rate = dict(trainor["lr_decay_params"]), trainor["optim_params"].get("lr")
    if trainor["lr_decay"] == "CyclicLR":
        # between two rates of which one is the optimizer's: another one is another schedule
        options.setdefault("max_lr", rate)
    elif "max_lr" in options and options["max_lr"] == rate:
        del options["max_lr"]
    return trainor["lr_decay"], options


class Schedule:
    """A learning-rate scheduler of torch, stepped at the time its kind needs.

    Plateau schedulers step after an evaluation, on its score; step-wise decays
    (`StepLR`, `MultiStepLR`, `ExponentialLR`), whose options count epochs, step after an epoch; all
    others (cosine, linear warm-up, one-cycle, cyclic, polynomial) step after each optimizer step
    and count in steps.

    Args:
        optimizer: whose learning rate is changed.
        section: `lr_decay` and its options. `T_max` and `total_steps` are the steps of the run
            unless given, and `max_lr` is the optimizer's learning rate.
        total_steps: number of optimizer steps of the whole schedule; of a resumed run the steps
            done plus the steps left, whatever a step was before.
        better: `higher` or `lower`: which score is better for a plateau scheduler; sets its
            `mode` unless that is given.

    Raises:
        ConfigError: torch refuses an option, or the schedule does not fit a run of this length.
    """

    def __init__(
        self, optimizer: Optimizer, section: TrainorSection, total_steps: int, *, better: str
    ) -> None:
        self._scheduler: Any = None
        self._name = section.lr_decay
        if self._name is None:
            return
        cls = named_class("torch.optim.lr_scheduler", self._name)
        options = dict(section.lr_decay_params)
        if self.on_plateau:
            options.setdefault("mode", "min" if better == "lower" else "max")
        known = inspect.signature(cls).parameters
        for argument in LENGTH_ARGUMENTS:
            if argument in known and "epochs" not in options:
                options.setdefault(argument, max(1, total_steps))
        if "max_lr" in known:
            options.setdefault("max_lr", optimizer.defaults["lr"])
        scales = [group.get(SCALE, 1.0) for group in optimizer.param_groups]
        for rate in ("max_lr", "base_lr"):  # torch takes one number as that of every group
            if isinstance(options.get(rate), int | float) and set(scales) != {1.0}:
                options[rate] = [options[rate] * scale for scale in scales]
        try:
            if self._name == "OneCycleLR" and self._warms_up_in_no_step(options):
                # Torch divides by the length of the warm-up, 0 at exactly 1 / pct_start steps.
                options["pct_start"] *= 1 + 1e-9
            self._scheduler = cls(optimizer, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"trainor.lr_decay_params ({self._name}): {error}") from error
        except ZeroDivisionError as error:
            raise ConfigError(
                f"trainor.lr_decay_params ({self._name}): the run has "
                f"{counted(total_steps, 'step')}, too few for a phase of this schedule. Raise "
                "trainor.epochs or trainor.steps, or set "
                "trainor.lr_decay=null."
            ) from error
        if self._name not in PER_EPOCH:
            self._check_length(total_steps)
        if set(scales) != {1.0} and (lowest := getattr(self._scheduler, "eta_min", 0.0)):
            self._check_lowest(lowest, optimizer.param_groups)

    def _check_lowest(self, lowest: float, groups: list[dict[str, Any]]) -> None:
        """Refuse a lowest rate above the rate of a group, which would rise to it."""
        rates = [float(rate) for rate in self._scheduler.base_lrs]
        for group, rate in zip(groups, rates, strict=True):
            if rate < lowest:
                raise ConfigError(
                    f"trainor.lr_decay_params.eta_min ({self._name}): given {lowest:g}, to which "
                    f"the rate of {group.get(GROUP, 'a part of the model')}, {rate:g}, would rise. "
                    f"Allowed: at most {min(rates):g}, the lowest rate of a group."
                )

    @staticmethod
    def _warms_up_in_no_step(options: dict[str, Any]) -> bool:
        share = options.setdefault("pct_start", 0.3)
        length = options.get("epochs", 0) * options.get("steps_per_epoch", 0)
        steps = options.get("total_steps") or length
        return bool(share < 1 and float(share * steps) == 1)

    def _check_length(self, steps: int) -> None:
        """Refuse a schedule that ends, or reaches a learning rate of zero, within the run."""
        where = f"trainor.lr_decay_params ({self._name})"
        end = getattr(self._scheduler, "total_steps", None)
        if end is not None and end < steps:
            raise ConfigError(
                f"{where}: the schedule ends after {counted(end, 'step')}, but the run has "
                f"{steps}. Leave total_steps, epochs and steps_per_epoch out, and it is as long "
                "as the run."
            )
        fades = self._name == "PolynomialLR" or getattr(self._scheduler, "end_factor", 1) == 0
        iterations = getattr(self._scheduler, "total_iters", steps)
        if fades and iterations < steps:
            raise ConfigError(
                f"{where}: the learning rate is 0 after {iterations} of the "
                f"{counted(steps, 'step')} of the run. Set "
                f"trainor.lr_decay_params.total_iters={steps}."
            )

    @property
    def on_plateau(self) -> bool:
        """Whether the schedule waits for a score."""
        return self._name == "ReduceLROnPlateau"

    def after_step(self) -> None:
        """Call after each step, also one that was skipped: the schedule counts attempts."""
        if self._scheduler is not None and not self.on_plateau and self._name not in PER_EPOCH:
            self._scheduler.step()

    def after_epoch(self) -> None:
        """Call after each epoch."""
        if self._name in PER_EPOCH:
            self._scheduler.step()

    def after_evaluation(self, score: float) -> None:
        """Call after each evaluation that counts, with its score."""
        if self.on_plateau:
            self._scheduler.step(score)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint; the length of the run is that of the current configuration."""
        if self._scheduler is not None:
            own = self._scheduler.state_dict()
            length = {key: own[key] for key in LENGTH_STATE if key in own}
            stretched = any(state.get(key) != value for key, value in length.items())
            base = [group.get("initial_lr") for group in self._scheduler.optimizer.param_groups]
            self._scheduler.load_state_dict({**state, **length})
            if hasattr(self._scheduler, "base_lrs") and None not in base:
                self._scheduler.base_lrs = base
            if stretched and hasattr(self._scheduler, "_get_closed_form_lr"):
                # The cosine computes each rate from the one before: a rate of zero stays zero.
                rates = self._scheduler._get_closed_form_lr()
                for group, lr in zip(self._scheduler.optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr


class WarmupCosineLR(lr_scheduler.LRScheduler):
    """Linear warm-up from 0, then half a cosine to the end of the run.

    That is `get_cosine_schedule_with_warmup` of transformers: at step s, counted from 0, of S with
    a warm-up of W, the factor of every group's rate is s / W first and then
    (1 + cos(pi (s - W) / (S - W))) / 2. The cosine is that of SGDR (Loshchilov and Hutter 2017,
    arXiv 1608.03983), the warm-up that of Goyal et al. 2017, arXiv 1706.02677.

    Args:
        optimizer: whose rates are changed.
        total_steps: steps of the run.
        warmup: length of the warm-up: an integer is a number of steps (500), a fraction a share
            of the run (0.1).
        end_factor: final rate as a share of the initial one.
        last_epoch: -1, as a resumed run takes the rest from its checkpoint.

    Raises:
        ValueError: the warm-up is as long as the run, or longer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: Annotated[int, AtLeast(1)],
        warmup: Annotated[int, AtLeast(0)] | Annotated[float, AtLeast(0), Below(1)] = 0.1,
        end_factor: Annotated[float, Between(0, 1)] = 0.0,
        last_epoch: Annotated[int, Between(-1, -1)] = -1,
    ) -> None:
        self.total_steps, self.warmup, self.end_factor = total_steps, warmup, end_factor
        if self.warmup_steps >= max(total_steps, 1):
            raise ValueError(
                f"the warm-up takes {counted(self.warmup_steps, 'step')}, and the schedule has "
                f"{total_steps}. "
                "Give fewer, or a share of the run such as warmup=0.1"
            )
        super().__init__(optimizer, last_epoch)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        share = isinstance(self.warmup, float)
        return round(self.warmup * self.total_steps) if share else int(self.warmup)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates of the groups for the next step."""
        return [rate * self._factor(self.last_epoch) for rate in self.base_lrs]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return self.get_lr()

    def _factor(self, step: int) -> float:
        warmup = self.warmup_steps
        if step < warmup:
            return step / max(1, warmup)
        done = (step - warmup) / max(1, self.total_steps - warmup)
        cosine = max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
        return self.end_factor + (1 - self.end_factor) * cosine


def _default_rate(cls: Any) -> float:
    """The learning rate that an optimizer takes when none is given."""
    known = inspect.signature(cls).parameters
    return float(known["lr"].default) if "lr" in known else 0.0


def _can_be_fused(cls: Any, parameters: list[Any], options: dict[str, Any]) -> bool:
    """Return whether torch has a fused update that the options do not turn on or off."""
    if "fused" not in inspect.signature(cls).parameters or options.keys() & KERNELS:
        return False
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    if isinstance(first, DTensor) and cls not in FUSED_WHEN_SHARDED:
        return False
    try:
        cls(parameters, **options, fused=True)
    except (RuntimeError, TypeError, ValueError):  # not on this device, or an option is wrong
        return False
    return True


def _changed_options(
    optimizer: Optimizer, saved: dict[str, Any], options: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Then and now of the options that differ."""
    parameters = inspect.signature(type(optimizer)).parameters
    both = {
        key: tuple(given.get(key, parameters[key].default) for given in (saved, options))
        for key in dict.fromkeys([*saved, *options])
        if key in parameters
    }
    return {key: (old, new) for key, (old, new) in both.items() if old != new}
