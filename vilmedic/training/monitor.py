"""Training monitor: progress bars, logged numbers, bad steps and timing."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from vilmedic.config.sections import TrainorSection
from vilmedic.distributed import processes
from vilmedic.distributed.launch import is_main_process
from vilmedic.errors import DataError
from vilmedic.log import BAR, LOGGER, clock, counted
from vilmedic.training.health import Observed, StuckWarning, contrastive_diagnostics, observing
from vilmedic.training.metrics_log import MetricsLog, NoLog
from vilmedic.training.parallel import Group
from vilmedic.training.step import StepResult, Tally

T = TypeVar("T")
GIB = 1024**3
STEPS = "{desc}  {n_fmt}/{total_fmt} {bar}"
"""The bar of an epoch, in front of its numbers."""
SKIPPED = 3
"""Steps before the trace: the first ones load libraries and fill caches."""


class StepWatch:
    """Watches every step, and reads its numbers where synchronising with the device is acceptable.

    That is every step on a CPU, and the steps that are logged on a GPU.

    Args:
        section: `log_every` and `max_bad_steps`.
        model: the model that is trained.
        data: names the samples of a bad step.
        tally: counts bad steps.
        epochs: number of epochs of the run; None takes those of the section.

    Attributes:
        log: where numbers go; nowhere until it is set.
    """

    def __init__(
        self,
        section: TrainorSection,
        model: nn.Module,
        data: Any,
        tally: Tally,
        epochs: int | None = None,
    ) -> None:
        self.section, self.model, self.data = section, model, data
        self.device = next(model.parameters()).device
        self.log: MetricsLog | NoLog = NoLog()
        self.tally = tally
        self.bars = RunBars(section.epochs if epochs is None else epochs)
        self.throughput = Throughput(self.device)
        self.stuck = StuckWarning()
        self._observed = Observed()
        self._bad_logged, _ = tally.bad_steps()

    def start_epoch(self, epoch: int, steps: int, done: int) -> None:
        """Open the progress bar of an epoch of `steps` steps, some of which may be done."""
        self._epoch = epoch
        self.bars.start_epoch(epoch, steps, done)
        self.throughput.restart()

    def waiting_for(self, groups: Iterable[T]) -> Iterator[T]:
        """Yield batch groups and measure the waiting time."""
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
        """Close the progress bar and log the samples left out."""
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
        """Process a step.

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
            **{"loss": f"{loss:.4g}", "lr": f"{settings['lr']:.1e}", "samples/s": f"{rate:.0f}"}
        )
        self._log_bad_steps(step, result, group)
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
        """The health of contrastive training, measured on the last batch of the step."""
        features, self._observed.features = self._observed.features, {}
        if not features:
            return {}
        return contrastive_diagnostics(
            self.model, features, loss, group.batches[-1], group.parts[-1].total
        )

    def _log_bad_steps(self, step: int, result: StepResult, group: Group) -> None:
        """Log newly skipped steps; end the run after too many in a row."""
        bad, in_a_row = self.tally.bad_steps()
        what = f"loss {result.loss.item()}, gradient norm {result.grad_norm.item()}"
        if bad > self._bad_logged:
            LOGGER.warning(
                "Skipped %d of the steps up to %d: %s", bad - self._bad_logged, step, what
            )
            self._bad_logged = bad
        if in_a_row >= self.section.max_bad_steps:
            lines = [
                line for batch in group.batches for line in self.data.lines(batch["index"].tolist())
            ]
            raise DataError(
                f"{counted(in_a_row, 'step')} in a row {'was' if in_a_row == 1 else 'were'} "
                f"skipped ({what}; "
                f"trainor.max_bad_steps={self.section.max_bad_steps}). A smaller learning rate, "
                "trainor.clip_grad_norm or trainor.precision=fp32 may help. Samples of the last "
                "step:\n  " + "\n  ".join(lines)
            )


class RunBars:
    """Shows the epochs of a run and the steps of each epoch.

    On a terminal these are two bars. In a file, under Slurm say, it is a line after `every`
    seconds within an epoch, so that a long epoch is seen to move and a short one adds nothing.
    Processes other than the main one show nothing.

    Args:
        epochs: number of epochs of the run.
        every: seconds between two lines where there is no terminal.
        terminal: whether bars can be drawn; None asks the standard error stream.
    """

    def __init__(self, epochs: int, *, every: float = 30.0, terminal: bool | None = None) -> None:
        self._main = is_main_process()
        self._terminal = self._main and (sys.stderr.isatty() if terminal is None else terminal)
        self._every = every
        self._epochs = epochs
        self._outer: tqdm[Any] | None = None
        self._inner: tqdm[Any] | None = None

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """Begin an epoch.

        Args:
            epoch: counted from 0.
            steps: its number of steps.
            done: steps of it that were done before.
        """
        self._title = f"Epoch {epoch + 1} of {self._epochs}"
        self._steps, self._done, self._here = steps, done, 0
        self._began = self._told = time.monotonic()
        if not self._terminal:
            return
        if self._outer is None:
            self._outer = tqdm(
                total=self._epochs,
                initial=epoch,
                desc="Epochs",
                unit="done",
                dynamic_ncols=True,
                bar_format=BAR,
            )
        self._inner = tqdm(
            total=steps,
            initial=done,
            desc=self._title,
            leave=False,
            position=1,
            dynamic_ncols=True,
            bar_format=f"{STEPS}  {{remaining}} left",
        )

    def step(self) -> None:
        """Count a step."""
        self._here += 1
        if self._inner is not None:
            self._inner.update()

    def show(self, **numbers: str) -> None:
        """The newest numbers, beside the bar or, when it is time, in a line."""
        if self._inner is not None:
            text = "  ".join(f"{name} {value}" for name, value in numbers.items())
            # the bar takes what the numbers leave: at 80 columns they are seen, and little of it
            self._inner.bar_format = f"{STEPS}  {{remaining}} left  {text}"
            self._inner.refresh()
        now = time.monotonic()
        if self._terminal or not self._main or now - self._told < self._every:
            return
        self._told = now
        step = self._done + self._here
        left = (now - self._began) / max(self._here, 1) * (self._steps - step)
        text = "".join(f"  {name} {value}" for name, value in numbers.items())
        LOGGER.info(
            "%s  step %d of %d%s  %s left", self._title, step, self._steps, text, clock(left)
        )

    def end_epoch(self) -> None:
        """End an epoch."""
        if self._inner is not None:
            self._inner.close()
            self._inner = None
        if self._outer is not None:
            self._outer.update()

    def close(self) -> None:
        """Take the bars down."""
        for bar in (self._inner, self._outer):
            if bar is not None:
                bar.close()
        self._inner = self._outer = None


class Throughput:
    """Samples a second, the share of time spent waiting for data, and memory.

    Args:
        device: where the run computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waits: HostWaits | DeviceWaits = (
            DeviceWaits(device) if device.type == "cuda" else HostWaits()
        )
        self._samples = 0
        self._since = time.perf_counter()

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches and measure the waiting time for each."""
        iterator = iter(batches)
        while True:
            self._waits.begin()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waits.end()
            yield batch

    def count(self, samples: int) -> None:
        """Add samples that were trained on."""
        self._samples += samples

    def restart(self) -> None:
        """Begin a new interval, after an evaluation say."""
        self._samples = 0
        self._waits.restart()
        self._since = time.perf_counter()

    def rate(self) -> float:
        """Samples a second since the interval began."""
        return self._samples / max(time.perf_counter() - self._since, 1e-9)

    def numbers(self) -> dict[str, float]:
        """The numbers of the interval, after which a new one begins.

        Returns:
            `samples_per_second`; `data_wait`, the share of the time in which whatever computes has
            nothing to do because the loader has no batch;
            `memory_gib`, the most that the run held so far: on a GPU of tensors there, on the CPU
            of resident memory of this process, loaders left out.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        numbers = {
            "samples_per_second": round(self.rate(), 2),
            "data_wait": round(min(self._waits.seconds() / elapsed, 1.0), 4),
            "memory_gib": round(peak_memory(self.device) / GIB, 3),
        }
        self.restart()
        return numbers


class HostWaits:
    """Time that a computing CPU waits for batches: until each one arrives."""

    def __init__(self) -> None:
        self._seconds = self._began = 0.0

    def begin(self) -> None:
        """A batch is asked for."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """It is there."""
        self._seconds += time.perf_counter() - self._began

    def seconds(self) -> float:
        """Time waited since the last restart."""
        return self._seconds

    def restart(self) -> None:
        """Forget what was waited so far."""
        self._seconds = 0.0


class DeviceWaits:
    """Time that a GPU waits for batches: from its last kernel to the next batch.

    The host asks for a batch while the GPU is busy with earlier steps, and waits for nothing that
    counts until that has come to its end. So the GPU itself notes two times, one behind the work
    that it had when a batch was asked for, one when it hears that the batch is there. While it
    has work, the second follows the first at once.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Any = None
        self._open: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    def begin(self) -> None:
        """A batch is asked for."""
        self._began = self._now()

    def end(self) -> None:
        """It is there."""
        self._open.append((self._began, self._now()))
        while self._open[0][1].query() and len(self._open) > 1:
            self._add()

    def seconds(self) -> float:
        """Time waited since the last restart; waits until the GPU has begun with the last batch."""
        while self._open:
            self._open[0][1].synchronize()
            self._add()
        return self._seconds

    def restart(self) -> None:
        """Forget what was waited so far."""
        self._open.clear()
        self._seconds = 0.0

    def _add(self) -> None:
        began, ended = self._open.popleft()
        self._seconds += began.elapsed_time(ended) / 1000

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class StepProfiler:
    """Traces a number of steps and writes `profile_<seed>.json` and `.txt`.

    The trace opens in chrome://tracing or https://ui.perfetto.dev; the table has one line an
    operation, and those of the engine itself: data, forward, backward and update.

    Args:
        steps: number of steps to trace, after the first three; None traces nothing.
        run_dir: where the files go.
        seed: the run's seed.
        device: where the model computes.
    """

    def __init__(self, steps: int | None, run_dir: Path, seed: int, device: torch.device) -> None:
        self._files = [run_dir / f"profile_{seed}.{suffix}" for suffix in ("json", "txt")]
        self._cuda = device.type == "cuda"
        self._left = 0
        self._profiler: profile | None = None
        if steps is not None:
            self._left = SKIPPED + steps
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * self._cuda)],
                schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
            )

    def __enter__(self) -> StepProfiler:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            LOGGER.warning("The run ended before trainor.profile had its steps; nothing is written")

    def after_step(self) -> None:
        """Call after each step; writes the files after the last one to trace."""
        if self._profiler is None:
            return
        self._left -= 1
        if self._left == 0:
            self._profiler.stop()
            try:
                self._write(self._profiler)
            except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
                LOGGER.warning("The trace of trainor.profile could not be written: %s", error)
            self._profiler = None
        else:
            self._profiler.step()

    def _write(self, profiler: profile) -> None:
        trace, table = self._files
        profiler.export_chrome_trace(str(trace))
        key = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        averages = profiler.key_averages()
        engine = [one for one in averages if one.key in ("data", "forward", "backward", "update")]
        lines = [
            f"{one.key:10s} {one.cpu_time_total / 1e6:9.3f} s on the CPU"
            + (f" {one.device_time_total / 1e6:9.3f} s on the GPU" if self._cuda else "")
            for one in engine
        ]
        text = "\n".join(lines)
        table.write_text(f"{text}\n\n{averages.table(sort_by=key, row_limit=40)}\n", "utf-8")
        LOGGER.info("Where the time of the profiled steps went:\n%s", text)
        LOGGER.info("Written: %s and %s", trace, table)


def peak_memory(device: torch.device) -> int:
    """Bytes held at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system that Python runs on

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
