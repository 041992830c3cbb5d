"""Time, kernels, memory and waits of a step on a GPU, and those of them that a CPU has."""

from __future__ import annotations

import collections
import gc
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
Step = Callable[[], object]


class Device:
    """A device and its measurements.

    Args:
        device: a GPU or the CPU.
        seconds: duration of a measurement, in three rounds of several steps; 0 takes one step.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, step: Step, warm: int = 2) -> dict[str, float]:
        """Milliseconds of a step.

        Returns:
            `ms`: time of a step within a series, with the device always busy; median of three
            rounds. `queue_ms`: CPU time to queue a step; close to `ms`, the CPU is the bottleneck.
        """
        for _ in range(warm if self.seconds else 1):
            step()
        self.wait()
        began = time.perf_counter()
        step()
        self.wait()
        once = time.perf_counter() - began
        count = max(1, min(50, int(self.seconds / 3 / max(once, 1e-6))))
        rounds, queued = [], []
        for _ in range(3 if self.seconds else 1):
            began = time.perf_counter()
            for _ in range(count):
                step()
            queued.append((time.perf_counter() - began) / count)
            self.wait()
            rounds.append((time.perf_counter() - began) / count)
        return {
            "ms": _figures(1e3 * statistics.median(rounds)),
            "queue_ms": _figures(1e3 * statistics.median(queued)),
        }

    def peak(self, step: Step) -> dict[str, float]:
        """Peak GiB allocated during a step, including what was allocated before; GPU only."""
        if not self.cuda:
            return {}
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        self.wait()
        return {"peak_gib": _figures(torch.cuda.max_memory_allocated(self.device) / GIB)}

    def kernels(self, step: Step) -> dict[str, float]:
        """Kernels of a step, copies included; on a CPU its operations.

        Returns:
            `kernels` and `busy_ms`, the sum of their times.
        """
        activities = [ProfilerActivity.CPU] + self.cuda * [ProfilerActivity.CUDA]
        step()
        self.wait()
        with profile(activities=activities) as trace:
            step()
            self.wait()
        events: Any = trace.events() or []
        if self.cuda:
            # Ranges that the code has marked appear on the device too, under the same names.
            marked = {e.name for e in events if e.device_type == DeviceType.CPU}
            found = [e for e in events if e.device_type == DeviceType.CUDA]
            found = [event for event in found if event.name not in marked]
        else:
            found = [e for e in events if e.name.startswith("aten::") and not e.cpu_children]
        busy = sum(event.time_range.elapsed_us() for event in found) / 1e3
        return {"kernels": len(found), "busy_ms": _figures(busy)}

    def stalls(self, step: Step) -> dict[str, int]:
        """How often the host waits for the device in a step, by line of this package.

        A GPU reports every wait. On a CPU, where nothing waits, reads of tensor values are counted.
        """
        found: collections.Counter[str] = collections.Counter()
        if not self.cuda:
            with _ReadNumbers(found):
                step()
            return dict(found)
        self.wait()
        with _told_of_waits(found):
            step()
        self.wait()
        return dict(found)

    def release(self) -> None:
        """Free memory that is no longer used."""
        if self.cuda:
            gc.collect()  # hooks and closures keep models in reference cycles
            torch.cuda.empty_cache()


def flop(step: Step) -> float:
    """Floating-point operations of the matrix products and convolutions of a step."""
    # Older versions of torch fail on a product with a different result dtype.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _bmm_flop}) as counter:
        step()
    return float(counter.get_total_flops())


def _bmm_flop(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2]


def _line() -> str:
    """The innermost running line of this package or of these benchmarks."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT))]
    frames = [f for f in frames if Path(f.filename).name != Path(__file__).name]
    frames = [f for f in frames if "site-packages" not in f.filename]  # of `.venv`
    inside = [f for f in frames if "/vilmedic/" in f.filename.removeprefix(str(ROOT))] or frames
    if not inside:
        return "elsewhere"
    return f"{Path(inside[-1].filename).relative_to(ROOT)}:{inside[-1].lineno}"


class _ReadNumbers(TorchDispatchMode):
    def __init__(self, found: collections.Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found[_line()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _told_of_waits(found: collections.Counter[str]) -> Iterator[None]:
    def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "called a synchronizing" in str(message):
            found[_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _figures(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")
