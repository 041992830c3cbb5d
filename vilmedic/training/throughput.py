"""How fast a run is and what it waits for."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
GIB = 1024**3


class Throughput:
    """Samples a second, the share of time spent waiting for data, and memory.

    Args:
        device: where the run computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._samples = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass on batches and time how long each is waited for."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def count(self, samples: int) -> None:
        """Add samples that were trained on."""
        self._samples += samples

    def restart(self) -> None:
        """Begin a new interval, after an evaluation say."""
        self._samples, self._waited = 0, 0.0
        self._since = time.perf_counter()

    def rate(self) -> float:
        """Samples a second since the interval began."""
        return self._samples / max(time.perf_counter() - self._since, 1e-9)

    def numbers(self) -> dict[str, float]:
        """The numbers of the interval, after which a new one begins.

        Returns:
            `samples_per_second`; `data_wait`, the share of the time spent waiting for the loader;
            `memory_gib`, the most that the run held so far: on a GPU of tensors there, on the CPU
            of resident memory of this process, loaders left out.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        numbers = {
            "samples_per_second": round(self.rate(), 2),
            "data_wait": round(min(self._waited / elapsed, 1.0), 4),
            "memory_gib": round(peak_memory(self.device) / GIB, 3),
        }
        self.restart()
        return numbers


def peak_memory(device: torch.device) -> int:
    """Bytes held at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system that Python runs on

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
