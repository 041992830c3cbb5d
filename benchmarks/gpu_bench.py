"""Shared parts of `benchmarks/gpu.py`: rows with a time budget, matrix product modes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu_timing import Device
from benchmarks.published_systems import Lacking, Systems
from vilmedic import device as devices

Row = dict[str, Any]


@dataclass
class Bench:
    """Shared state of the sections.

    Args:
        timing: the device and its measurements.
        systems: the models and batches.
        found: all results so far; a section adds its own.
        write: writes them to the file.
        tiny: whether this is a trial run, whose results mean nothing.
        names: systems whose training is measured.

    Attributes:
        deadline: when the section should end, in `time.perf_counter` seconds.
        operations: floating-point operations of steps, by name and number of samples.
    """

    timing: Device
    systems: Systems
    found: dict[str, Any]
    write: Callable[[], None]
    tiny: bool
    names: tuple[str, ...]
    deadline: float = 0.0
    operations: dict[tuple[str, int], float] = field(default_factory=dict)
    _section: str = ""
    _slowest: float = field(default=0.0)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.timing.device

    def start(self, section: str, seconds: float) -> None:
        """Begin a section, which has its own time budget and the unused time of earlier ones."""
        self._section, self._slowest = section, 0.0
        self.deadline += seconds
        self.found[section] = {}

    def row(self, key: str, measure: Callable[[], Any]) -> Any:
        """Measure a row of the section, if there is time for another as slow as the slowest."""
        began = time.perf_counter()
        if not self.tiny and began + self._slowest > self.deadline:
            self.found["skipped"][f"{self._section}: {key}"] = "no time left"
            return None
        row = None
        try:
            row = self.found[self._section][key] = measure()
            print(self._section, key, row, flush=True)
        except Lacking as lack:
            self.found["skipped"][f"{self._section}: {key}"] = str(lack)
        except torch.OutOfMemoryError:
            self.found["skipped"][f"{self._section}: {key}"] = "out of memory"
        except Exception as error:
            self.failed(key, error)  # the others still run
        self.timing.release()
        self._slowest = max(self._slowest, time.perf_counter() - began)
        self.write()
        return row

    def failed(self, key: str, error: Exception) -> None:
        """Record a measurement that failed."""
        why = f"{type(error).__name__}: {str(error)[:300]}"
        self.found["failed"][f"{self._section}: {key}"] = why
        print(self._section, key, why, file=sys.stderr, flush=True)

    def kernels(self, step: Callable[[], object]) -> Row:
        """Kernels of a step; empty if the device cannot be traced."""
        try:
            return dict(self.timing.kernels(step))
        except RuntimeError as error:
            self.failed("kernels", error)
            return {}


@contextmanager
def products(kind: str) -> Iterator[None]:
    """Matrix products in full float32 (`ieee`), or with 19-bit inputs (`tf32`).

    Except for `ieee`, cuDNN's benchmark mode selects the fastest convolutions.
    """
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    torch.backends.cudnn.benchmark = kind != "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False


def our_products(bench: Bench, kind: str) -> AbstractContextManager[None]:
    """The same, as this version sets it for a training; `as set` is its default."""
    setting = getattr(devices, "float32_products", None)
    if setting is not None:
        return cast(AbstractContextManager[None], setting(bench.device, tf32=kind != "ieee"))
    return nullcontext() if kind in ("as set", "bf16") else products(kind)


def relative(value: Tensor, right: Tensor) -> float:
    """Relative error: norm of the difference over the norm of the right value."""
    return float(f"{float((value - right).norm() / right.norm()):.3g}")


def needs_gpu(bench: Bench, kind: str) -> None:
    """Skip what a CPU does not support.

    Raises:
        Lacking: the device is a CPU and `kind` needs a GPU.
    """
    if kind == "tf32" and not bench.timing.cuda:
        raise Lacking("TF32 products: a CPU has none")
