"""Peak memory of a process, or of its GPU tensors, during a block of code."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

MIB = 2**20


def start_peak(device: torch.device) -> float:
    """Start to track the peak size; return the current size in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def read_peak(device: torch.device) -> float:
    """The peak size since `start_peak`, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return read_status("VmHWM")


def read_status(field: str) -> float:
    """A size of this process in MiB, as Linux reports it."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only.")
    return int(found[1]) / 1024
