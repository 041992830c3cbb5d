"""Time and memory of a computation, as all benchmarks here take them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


def seconds(step: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one step."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def peak_memory(step: Callable[[], object], device: str = "cpu") -> float:
    """MiB that one step takes at its peak above what was held before; for a fresh process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / MIB
        step()
        return torch.cuda.max_memory_allocated() / MIB - held
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    held = _status("VmRSS")
    step()
    return _status("VmHWM") - held


def in_fresh_process(*arguments: str) -> float:
    """The number that this script, run anew with further arguments, prints last."""
    command = [sys.executable, *sys.argv, *arguments]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(child.stdout.split()[-1])


def _status(field: str) -> float:
    """A size of this process in MiB, as Linux reports it."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only.")
    return int(found[1]) / 1024
