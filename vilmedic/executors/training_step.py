"""One optimizer step: accumulate, check, clip, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from vilmedic.config.sections import TrainorSection
from vilmedic.executors.device import autocast, move
from vilmedic.models.contract import ContrastiveModel, Model


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Args:
        loss: mean loss over the samples of the group.
        grad_norm: Euclidean norm of the gradient before clipping.
        taken: False when loss or gradient was not a number and the step was skipped.
        samples: number of samples in the group.
    """

    loss: float
    grad_norm: float
    taken: bool
    samples: int


class TrainingStep:
    """Takes optimizer steps on groups of batches.

    Args:
        model: the model; called through `forward`.
        prepare: the batched step on the device that makes floats of images.
        optimizer: updates the parameters it holds.
        section: accumulation, clipping and precision.
        device: where the model is.
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

    def __call__(self, group: list[dict[str, Any]]) -> StepResult:
        """Accumulate the gradient of a group of batches, clip it and update the weights.

        The loss of the group is the mean over its samples, so the gradient is that of one big
        batch wherever the model does not compare samples. A loss or gradient that is not a number
        leaves weights, running statistics and optimizer state as they were.

        Args:
            group: at most `grad_accu` batches as the loader gives them.
        """
        samples = sum(len(batch["index"]) for batch in group)
        statistics = [buffer.clone() for buffer in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for batch in group:
            share = len(batch["index"]) / samples
            with autocast(self.device, self.section.precision):
                batch_loss = self._forward(move(batch, self.device))["loss"]
            (batch_loss * share).backward()
            loss += batch_loss.detach().float() * share

        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
        taken = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if taken:
            if self.section.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self.parameters, self.section.clip_grad_norm, norm
                )
            self.optimizer.step()
        else:
            for buffer, value in zip(self.statistics, statistics, strict=True):
                buffer.copy_(value)
        return StepResult(loss.item(), norm.item(), taken, samples)

    def _forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's output; one that encodes in chunks also makes the floats of a chunk only."""
        if isinstance(self.model, ContrastiveModel):
            return self.model(batch, self.prepare)
        return self.model(self.prepare(batch))
