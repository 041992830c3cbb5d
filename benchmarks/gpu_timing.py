"""Times, kernels, memory and waits of a step on a GPU; on a CPU those that mean something there."""

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
    """A device and what is read from it.

    Args:
        device: a GPU or the CPU.
        seconds: how long a figure is measured, in three rounds of several steps; 0 takes one step.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all that was queued."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, step: Step, warm: int = 2) -> dict[str, float]:
        """Milliseconds of a step.

        Returns:
            `ms`: of a step among others, with the device busy all the time; the median of three
            rounds. `queue_ms`: what the CPU takes to queue one; near `ms`, the CPU is the bound.
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
        """GiB allocated at the highest during a step, all that is held included; GPU only."""
        if not self.cuda:
            return {}
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        self.wait()
        return {"peak_gib": _figures(torch.cuda.max_memory_allocated(self.device) / GIB)}

    def kernels(self, step: Step) -> dict[str, float]:
        """Kernels that a step runs, copies included; on a CPU the operations that it runs.

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
            # ranges that code has marked appear on the device too, under the names they have here
            marked = {e.name for e in events if e.device_type == DeviceType.CPU}
            found = [e for e in events if e.device_type == DeviceType.CUDA]
            found = [event for event in found if event.name not in marked]
        else:
            found = [e for e in events if e.name.startswith("aten::") and not e.cpu_children]
        busy = sum(event.time_range.elapsed_us() for event in found) / 1e3
        return {"kernels": len(found), "busy_ms": _figures(busy)}

    def stalls(self, step: Step) -> dict[str, int]:
        """How often the host waits for the device in a step, by line of this package.

        A GPU tells of every wait. On a CPU, where nothing waits, it is the numbers that are read.
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
        """Give back what is not held any more."""
        if self.cuda:
            gc.collect()  # hooks and closures hold models in circles
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
    """The innermost line of this package, or of these benchmarks, that is being run."""
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
    """Four figures."""
    return float(f"{value:.4g}")
