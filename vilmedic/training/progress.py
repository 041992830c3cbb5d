"""How far a run has come, and what its current epoch adds up to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from vilmedic.training.step import StepResult


@dataclass
class Progress:
    """What a checkpoint keeps of a run besides tensors and random numbers.

    Args:
        epoch: the epoch that is being trained, counted from 0.
        batch: batches of it that were trained on.
        step: optimizer steps taken or skipped.
        best: the best score so far.
        stale: evaluations in a row without improvement.
        lines: lines written to metrics.jsonl.
        tally: what `Tally` holds.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float | None = None
    stale: int = 0
    lines: int = 0
    tally: list[float] = field(default_factory=lambda: [0.0] * 5)


class Tally:
    """Sums over steps that stay on the device until they are asked for.

    Args:
        device: where the results of the steps are.
        values: what `read` gave.
    """

    def __init__(self, device: torch.device, values: list[float]) -> None:
        # Loss and number of steps that counted in this epoch; steps skipped as bad in this run,
        # the last ones in a row, and the most in a row since they were last looked at.
        self._sums = torch.tensor(values, dtype=torch.float64, device=device)

    def add(self, result: StepResult) -> None:
        """Count a step."""
        loss, counted, bad, in_a_row, longest = self._sums.unbind()
        in_a_row = torch.where(result.bad, in_a_row + 1, torch.where(result.taken, 0, in_a_row))
        self._sums = torch.stack(
            [
                loss + torch.where(result.taken, result.loss.double(), 0),
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
        """Mean loss of the steps of the epoch that were taken; not a number without any."""
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
