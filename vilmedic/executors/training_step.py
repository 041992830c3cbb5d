"""One optimizer step: accumulate, unscale, check, clip, update; nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from vilmedic.config.sections import TrainorSection
from vilmedic.executors.device import autocast, move
from vilmedic.executors.loss_scale import LossScale
from vilmedic.models.contract import ContrastiveModel, Model


@dataclass(frozen=True)
class StepResult:
    """What a step did, still on the device; reading a value waits for it.

    Args:
        loss: mean loss over the samples of the group, float scalar.
        grad_norm: Euclidean norm of the gradient before clipping, float scalar.
        taken: False when loss or gradient was not a number and the step was skipped, bool scalar.
        bad: whether that was the fault of model or data, rather than of a loss scale that now
            backs off, bool scalar.
        samples: number of samples in the group.
        parts: means over the samples of the other scalars that the model gave.
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
        optimizer: updates the parameters it holds. A fused one skips a step on the device; for
            others the step is read back before they are called.
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
        self.statistics = [b for b in model.buffers() if b.is_floating_point()]
        self.scale = LossScale(section.precision, device)

    def __call__(self, group: list[dict[str, Any]]) -> StepResult:
        """Accumulate the gradient of a group of batches, clip it and update the weights.

        The loss of the group is the mean over its samples, so the gradient is that of one big
        batch wherever the model does not compare samples. A loss or gradient that is not a number
        leaves weights, running statistics and optimizer state as they were.

        Args:
            group: at most `grad_accu` batches as the loader gives them.
        """
        statistics = [buffer.clone() for buffer in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        means = self._accumulate(group)
        loss = means.pop("loss")
        with record_function("update"):
            norm = self._unscale_and_clip()
            finite = torch.isfinite(loss) & torch.isfinite(norm)
            self._update_if(finite)
            for buffer, value in zip(self.statistics, statistics, strict=True):
                torch.where(finite, buffer, value, out=buffer)
            bad = ~finite & ~(torch.isfinite(loss) & self.scale.can_shrink())
            self.scale.update(finite)
        samples = sum(len(batch["index"]) for batch in group)
        return StepResult(loss, norm, finite, bad, samples, means)

    def _accumulate(self, group: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Add up the gradients of a group; returns the means of loss and other scalars."""
        samples = sum(len(batch["index"]) for batch in group)
        means: dict[str, Tensor] = {}
        for batch in group:
            share = len(batch["index"]) / samples
            with record_function("forward"), autocast(self.device, self.section.precision):
                output = self._forward(move(batch, self.device))
            with record_function("backward"):
                self.scale.scale(output["loss"] * share).backward()
            for name, value in output.items():
                if value.ndim == 0:
                    means[name] = means.get(name, 0.0) + value.detach().float() * share
        return means

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The model's output; one that encodes in chunks also makes the floats of a chunk only."""
        if isinstance(self.model, ContrastiveModel):
            return self.model(batch, self.prepare)
        return self.model(self.prepare(batch))

    def _unscale_and_clip(self) -> Tensor:
        """Bring the gradient to its size in one pass over it; returns its norm before clipping."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / self.scale.value
        factor = 1 / self.scale.value
        if self.section.clip_grad_norm is not None:
            factor = factor * (self.section.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        elif not self.scale.used:
            return norm
        torch._foreach_mul_(gradients, factor)
        return norm

    def _update_if(self, finite: Tensor) -> None:
        """Update the weights unless the gradient is not a number."""
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # Fused kernels read this themselves and leave weights, moments and counts alone.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif finite.item():
            self.optimizer.step()
