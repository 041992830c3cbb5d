"""Time and memory measurements shared by the benchmarks."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.parity.reference import missing_packages

MIB = 2**20


def require_reference() -> None:
    """Exit with a message when the reference implementation is not installed."""
    if missing := missing_packages():
        sys.exit(f"This comparison needs {', '.join(missing)}; run `make reference`.")


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
    """Peak MiB of one step above the size before it; for a fresh process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / MIB
        step()
        return torch.cuda.max_memory_allocated() / MIB - held
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident size
    held = _status("VmRSS")
    step()
    return _status("VmHWM") - held


def in_fresh_process(*arguments: str) -> float:
    """Run this script again with more arguments; return the last number that it prints."""
    command = [sys.executable, *sys.argv, *arguments]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(child.stdout.split()[-1])


def peak_memories() -> dict[str, float]:
    """Return the output of `--memory-of ours` and `--memory-of peer`, each in its own process."""
    memory = {}
    for name in ("ours", "peer"):
        memory[name] = in_fresh_process("--memory-of", name)
        print(f"{name}: peak memory {memory[name]:.1f} MiB", flush=True)
    return memory


def alternate(
    steps: dict[str, Callable[[], object]], repetitions: int, device: str = "cpu"
) -> dict[str, float]:
    """Median time of each step; steps alternate, after one warm-up of each.

    Args:
        steps: `ours` and `peer`.
        repetitions: counted steps of each.
        device: where they run.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            took = seconds(step, device)
            if repetition:
                times[name].append(took)
    for name, all_of_them in times.items():
        print(f"{name}: seconds", *(f"{second:.3f}" for second in all_of_them))
    return {name: statistics.median(all_of_them) for name, all_of_them in times.items()}


def print_result(name: str, times: dict[str, float], memory: dict[str, float]) -> None:
    """Print the last line: one JSON object; ratios above 1 mean that ours is better."""
    result = {
        "name": name,
        "ours": round(times["ours"], 4),
        "peer": round(times["peer"], 4),
        "unit": "s",
        "ratio": round(times["peer"] / times["ours"], 2),
        "memory_ratio": round(memory["peer"] / memory["ours"], 2),
    }
    print(json.dumps(result))


def _status(field: str) -> float:
    """A size of this process in MiB, as Linux reports it."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only.")
    return int(found[1]) / 1024
