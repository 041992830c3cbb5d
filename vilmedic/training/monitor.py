"""What is seen of a run while it trains: progress, numbers, and steps that went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from vilmedic.config.sections import TrainorSection
from vilmedic.distributed import processes
from vilmedic.errors import DataError
from vilmedic.log import LOGGER
from vilmedic.training.bars import RunBars
from vilmedic.training.diagnostics import Observed, contrastive_diagnostics, observing
from vilmedic.training.groups import Group
from vilmedic.training.health import StuckWarning
from vilmedic.training.metrics_log import MetricsLog
from vilmedic.training.no_log import NoLog
from vilmedic.training.progress import Tally
from vilmedic.training.step import StepResult
from vilmedic.training.throughput import Throughput

T = TypeVar("T")


class StepWatch:
    """Looks at every step, and at its numbers where waiting for the device is accepted.

    That is every step on a CPU, and the steps that are logged on a GPU.

    Args:
        section: `log_every` and `max_bad_steps`.
        model: the model that is trained.
        data: names the samples of a bad step.
        log: where numbers go.
        tally: counts bad steps.
    """

    def __init__(
        self,
        section: TrainorSection,
        model: nn.Module,
        data: Any,
        log: MetricsLog | NoLog,
        tally: Tally,
    ) -> None:
        self.section, self.model, self.data = section, model, data
        self.device = next(model.parameters()).device
        self.log, self.tally = log, tally
        self.bars = RunBars(section.epochs)
        self.throughput = Throughput(self.device)
        self.stuck = StuckWarning()
        self._observed = Observed()
        self._bad_told, _ = tally.bad_steps()

    def start_epoch(self, epoch: int, steps: int, done: int) -> None:
        """Open the progress bar of an epoch of `steps` steps, of which some were done before."""
        self._epoch = epoch
        self.bars.start_epoch(epoch, steps, done)
        self.throughput.restart()

    def waiting_for(self, groups: Iterable[T]) -> Iterator[T]:
        """Pass on what is trained on and time how long it is waited for."""
        return self.throughput.waiting_for(groups)

    @contextmanager
    def observing(self, step: int) -> Iterator[None]:
        """Keep the features that a step compares if its numbers are logged.

        Args:
            step: the number of the step, from 1.
        """
        with observing(self.model, step % self.section.log_every == 0) as self._observed:
            yield

    def end_epoch(self) -> None:
        """Close the progress bar and say which samples were left out."""
        self.bars.end_epoch()
        for skipped in processes.gather(self.data.skipped):
            self.data.skip(skipped)
        self.data.report_skipped()

    def close(self) -> None:
        """Take the progress bars down."""
        self.bars.close()

    def after_step(
        self,
        step: int,
        result: StepResult,
        settings: dict[str, float],
        group: Group,
    ) -> None:
        """Look at a step.

        Args:
            step: its number, from 1.
            result: what it did.
            settings: its learning rate `lr`, and what the model schedules.
            group: its batches.

        Raises:
            DataError: it is the last of too many bad ones in a row.
        """
        self.bars.step()
        self.throughput.count(result.samples)
        logged = step % self.section.log_every == 0
        if not logged and self.device.type != "cpu":
            return
        loss, rate = result.loss.item(), self.throughput.rate()
        self.bars.show(
            **{"loss": f"{loss:.4g}", "lr": f"{settings['lr']:.2e}", "samples/s": f"{rate:.1f}"}
        )
        self._tell_bad_steps(step, result, group)
        if not logged:
            return
        if result.taken:
            numbers = {"epoch": self._epoch, "loss": loss, **settings}
            numbers["grad_norm"] = result.grad_norm.item()
            numbers |= {name: value.item() for name, value in result.parts.items()}
            diagnostics = self._diagnostics(loss, group)
            self.stuck.look(step, diagnostics)
            self.log.metrics(step, numbers | diagnostics)
        self.log.timing(step, self.throughput.numbers())

    def _diagnostics(self, loss: float, group: Group) -> dict[str, float]:
        """The health of contrastive training, judged by the last batch of the step."""
        features, self._observed.features = self._observed.features, {}
        if not features:
            return {}
        return contrastive_diagnostics(
            self.model, features, loss, group.batches[-1], group.parts[-1].total
        )

    def _tell_bad_steps(self, step: int, result: StepResult, group: Group) -> None:
        """Tell of steps skipped since the last look; end the run after too many in a row."""
        bad, in_a_row = self.tally.bad_steps()
        what = f"loss {result.loss.item()}, gradient norm {result.grad_norm.item()}"
        if bad > self._bad_told:
            LOGGER.warning("Skipped %d of the steps up to %d: %s", bad - self._bad_told, step, what)
            self._bad_told = bad
        if in_a_row >= self.section.max_bad_steps:
            lines = [
                line for batch in group.batches for line in self.data.lines(batch["index"].tolist())
            ]
            raise DataError(
                f"{in_a_row} steps in a row were skipped ({what}; "
                f"trainor.max_bad_steps={self.section.max_bad_steps}). A smaller learning rate, "
                "trainor.clip_grad_norm or trainor.precision=fp32 may help. Samples of the last "
                "step:\n  " + "\n  ".join(lines)
            )
