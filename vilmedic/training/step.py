"""One optimizer step: accumulate, unscale, check, clip, update; never waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from vilmedic.config.sections import TrainorSection
from vilmedic.device import autocast, move, widest_float
from vilmedic.distributed.gather import Part, fill, joined, local
from vilmedic.models.contract import Model
from vilmedic.training.optimization import skips_by_itself, start_momentum
from vilmedic.training.parallel import Parallel

FIRST_SCALE = 2.0**16
STEPS_TO_GROW = 2000


@dataclass(frozen=True)
class StepResult:
    """Result of a step, still on the device; reading a value waits for it.

    Args:
        loss: mean loss over the samples of the group, float scalar.
        grad_norm: Euclidean norm of the gradient before clipping, float scalar.
        taken: False if loss or gradient was nan or inf and the step was skipped, bool scalar.
        bad: whether model or data caused that, rather than a loss scale that was too large,
            bool scalar.
        samples: number of samples in the group, those of other processes included.
        parts: sample means of the model's other scalars.
    """

    loss: Tensor
    grad_norm: Tensor
    taken: Tensor
    bad: Tensor
    samples: int
    parts: dict[str, Tensor]


class TrainingStep:
    """Takes optimizer steps on groups of batches.

    Args:
        model: the model; called through `forward`.
        prepare: the batched step on the device that makes floats of images.
        optimizer: updates its parameters. A fused one skips bad steps on the device; for others
            (`skips_by_itself`) the host reads whether to take the step.
        section: accumulation, clipping and precision.
        device: where the model is.

    Attributes:
        parameters: what the optimizer updates.
        scale: the loss scale.
    """

    def __init__(
        self,
        model: Model,
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        optimizer: Optimizer,
        section: TrainorSection,
        device: torch.device,
    ) -> None:
        self.model = model
        self.prepare = prepare
        self.optimizer = optimizer
        self.section = section
        self.device = device
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.statistics: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            if buffer.is_floating_point():
                self.statistics.setdefault(buffer.dtype, []).append(buffer)
        self.scale = LossScale(section.precision, device)
        self.parallel = Parallel(model, self.parameters)
        self._skips = skips_by_itself(optimizer, device)

    def __call__(
        self, group: list[dict[str, Any]], parts: Sequence[Part] | None = None
    ) -> StepResult:
        """Accumulate the gradients of a group of batches, clip them and update the weights.

        The loss of the group is the mean over its samples, so the gradient equals that of one
        large batch unless the model compares samples. A loss or gradient of nan or inf leaves
        weights, running statistics and optimizer state unchanged.

        Args:
            group: at most `grad_accu` batches as the loader gives them.
            parts: this process's part of each batch; None if it has the whole batch.
        """
        if parts is None:
            parts = [Part((len(batch["index"]),)) for batch in group]
        statistics = [joined(buffers) for buffers in self.statistics.values()]
        self.optimizer.zero_grad(set_to_none=True)
        means = self._accumulate(group, parts)
        loss = means.pop("loss")
        with record_function("update"):
            norm = self._unscale_and_clip()
            finite = torch.isfinite(loss) & torch.isfinite(norm)
            self._update_if(finite)
            for buffers, before in zip(self.statistics.values(), statistics, strict=True):
                fill(buffers, torch.where(finite, joined(buffers), before))
            bad = ~finite & ~(torch.isfinite(loss) & self.scale.can_shrink())
            self.scale.update(finite)
        samples = sum(part.total for part in parts)
        return StepResult(loss, norm, finite, bad, samples, means)

    def _accumulate(self, group: list[dict[str, Any]], parts: Sequence[Part]) -> dict[str, Tensor]:
        """Add up the gradients of a group; returns the means of loss and other scalars."""
        samples = sum(part.total for part in parts)
        means: dict[str, Tensor] = {}
        for number, (batch, part) in enumerate(zip(group, parts, strict=True), start=1):
            share = part.total / samples
            with self.parallel.accumulating(last=number == len(group)):
                with record_function("forward"), autocast(self.device, self.section.precision):
                    batch = move(batch, self.device)
                    output = self.parallel.forward(batch, self.prepare, part)
                with record_function("backward"):
                    self.scale.scale(output["loss"] * share).backward()
            for name, value in output.items():
                if value.ndim == 0:
                    means[name] = means.get(name, 0.0) + value.detach().float() * share
        self.parallel.finish_gradients()
        return self.parallel.average(means)

    def _unscale_and_clip(self) -> Tensor:
        """Unscale and clip the gradient in one pass; returns its norm before clipping."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.parallel.norm(gradients) / self.scale.value
        factor = 1 / self.scale.value
        if self.section.clip_grad_norm is not None:
            factor = factor * (self.section.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        elif not self.scale.used:
            return norm
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
        return norm

    def _update_if(self, finite: Tensor) -> None:
        """Update the weights unless the gradient is not a number."""
        if self._skips:
            start_momentum(self.optimizer)
            # Fused kernels read this themselves and leave weights, moments and counts alone.
            self.optimizer.found_inf = self.parallel.flag((~finite).float())  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif finite.item():
            self.optimizer.step()


class Tally:
    """Sums over steps that stay on the device until they are read.

    Args:
        device: where the results of the steps are.
        values: what `read` gave.
    """

    def __init__(self, device: torch.device, values: list[float]) -> None:
        # Loss and number of steps that counted in this epoch; steps skipped as bad in this run,
        # the last ones in a row, and the most in a row since they were last looked at.
        self._sums = torch.tensor(values, dtype=widest_float(device), device=device)

    def add(self, result: StepResult) -> None:
        """Count a step."""
        loss, counted, bad, in_a_row, longest = self._sums.unbind()
        in_a_row = torch.where(result.bad, in_a_row + 1, torch.where(result.taken, 0, in_a_row))
        self._sums = torch.stack(
            [
                loss + torch.where(result.taken, result.loss.to(loss.dtype), 0),
                counted + result.taken,
                bad + result.bad,
                in_a_row,
                torch.maximum(longest, in_a_row),
            ]
        )

    def read(self) -> list[float]:
        """All sums, as a checkpoint keeps them; waits for the device."""
        return self._sums.tolist()

    def mean_loss(self) -> float:
        """Return the mean loss of the epoch's steps that were taken; nan without any."""
        loss, counted, *_ = self.read()
        return loss / counted if counted else math.nan

    def bad_steps(self) -> tuple[int, int]:
        """Steps skipped as bad in the run, and the most in a row since this was last asked."""
        values = self.read()
        self._sums[4] = values[3]
        return int(values[2]), int(values[4])

    def start_epoch(self) -> None:
        """Forget the losses."""
        self._sums[:2] = 0


class LossScale:
    """Multiplies the loss before the backward pass; the gradient is divided by it afterwards.

    Halved whenever the gradient overflows, doubled after 2000 steps without that, and never below
    1 (Micikevicius et al. 2018, arXiv 1710.03740). Always a power of two, so that scaling rounds
    nothing. It lives on the device: nothing here waits for it.

    Args:
        precision: anything but `fp16` leaves the loss as it is.
        device: where the loss is.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.used = precision == "fp16"
        self.value = torch.full((), FIRST_SCALE if self.used else 1.0, device=device)
        self._good = torch.zeros((), device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.value if self.used else loss

    def can_shrink(self) -> Tensor:
        """Return whether the loss scale may have caused a gradient of nan or inf: bool scalar."""
        return self.value > 1

    def update(self, finite: Tensor) -> None:
        """Adapt the scale to the result of a step.

        Args:
            finite: whether loss and gradient were numbers, bool scalar.
        """
        if not self.used:
            return
        self._good = (self._good + 1) * finite
        grow = self._good >= STEPS_TO_GROW
        grown = torch.where(grow, self.value * 2, self.value)
        self.value = torch.where(finite, grown, self.value / 2).clamp(min=1.0)
        self._good = self._good * ~grow

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"value": self.value.item(), "good": self._good.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the scale of a run of the same precision."""
        self.value.fill_(state["value"])
        self._good.fill_(state["good"])
