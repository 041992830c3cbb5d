"""Where the time of some steps goes."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from vilmedic.log import LOGGER

SKIPPED = 3
"""Steps before the trace: the first ones load libraries and fill caches."""


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
