"""What is seen of a run while it trains: progress bar, log lines, and steps that went wrong."""

from __future__ import annotations

import time
from typing import Any

import torch
from tqdm import tqdm

from vilmedic import distributed
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import DataError
from vilmedic.executors.log import LOGGER, MetricsLog
from vilmedic.executors.no_log import NoLog
from vilmedic.executors.progress import Tally
from vilmedic.executors.training_step import StepResult
from vilmedic.launch import is_main_process


class StepWatch:
    """Looks at every step, and at its numbers where waiting for the device is accepted.

    That is every step on a CPU, and the steps that are logged on a GPU.

    Args:
        section: `log_every` and `max_bad_steps`.
        device: where the model computes.
        data: names the samples of a bad step.
        log: where numbers go.
        tally: counts bad steps.
    """

    def __init__(
        self,
        section: TrainorSection,
        device: torch.device,
        data: Any,
        log: MetricsLog | NoLog,
        tally: Tally,
    ) -> None:
        self.section, self.device, self.data = section, device, data
        self.log, self.tally = log, tally
        self._bad_told, _ = tally.bad_steps()

    def start_epoch(self, epoch: int, steps: int, done: int) -> None:
        """Open the progress bar of an epoch of `steps` steps, of which some were done before."""
        self._epoch = epoch
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc=f"Epoch {epoch}",
            disable=None if is_main_process() else True,
        )
        self._began, self._samples = time.perf_counter(), 0

    def end_epoch(self) -> None:
        """Close the progress bar and say which samples were left out."""
        self._bar.close()
        for skipped in distributed.gather(self.data.skipped):
            self.data.skip(skipped)
        self.data.report_skipped()

    def after_step(
        self, step: int, result: StepResult, lr: float, group: list[dict[str, Any]]
    ) -> None:
        """Look at a step.

        Args:
            step: its number, from 1.
            result: what it did.
            lr: its learning rate.
            group: its batches.

        Raises:
            DataError: it is the last of too many bad ones in a row.
        """
        self._bar.update()
        self._samples += result.samples
        logged = step % self.section.log_every == 0
        if not logged and self.device.type != "cpu":
            return
        rate = self._samples / (time.perf_counter() - self._began)
        loss = result.loss.item()
        self._bar.set_postfix(loss=f"{loss:.4g}", lr=f"{lr:.2e}", samples_s=f"{rate:.1f}")
        self._tell_bad_steps(step, result, group)
        if logged and result.taken:
            numbers = {"epoch": self._epoch, "loss": loss, "lr": lr}
            numbers["grad_norm"] = result.grad_norm.item()
            parts = {name: value.item() for name, value in result.parts.items()}
            self.log.metrics(step, numbers | parts)
            self.log.timing(step, {"samples_per_second": round(rate, 2)})

    def _tell_bad_steps(self, step: int, result: StepResult, group: list[dict[str, Any]]) -> None:
        """Tell of steps skipped since the last look; end the run after too many in a row."""
        bad, in_a_row = self.tally.bad_steps()
        what = f"loss {result.loss.item()}, gradient norm {result.grad_norm.item()}"
        if bad > self._bad_told:
            LOGGER.warning("Skipped %d of the steps up to %d: %s", bad - self._bad_told, step, what)
            self._bad_told = bad
        if in_a_row >= self.section.max_bad_steps:
            lines = [line for batch in group for line in self.data.lines(batch["index"].tolist())]
            raise DataError(
                f"{in_a_row} steps in a row were skipped ({what}; "
                f"trainor.max_bad_steps={self.section.max_bad_steps}). A smaller learning rate, "
                "trainor.clip_grad_norm or trainor.precision=fp32 may help. Samples of the last "
                "step:\n  " + "\n  ".join(lines)
            )
