"""Distributed processes: rank, world size and collective agreement.

`torchrun` starts one process per device and sets its rank in the environment. A run of one process,
even if started by `torchrun`, is not distributed: everything here then has no effect and no cost.
Agreements are exchanged between CPUs, so that they do not wait for a device.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""Timeout for waiting for another process, which may evaluate or draw for all."""

# Newer torch has other names for the same collectives, and warns of the old ones.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_alone = False


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Context that joins the process group and leaves it when all processes are done.

    Args:
        device: what this process computes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Two backends: for tensors on the device, and for agreements between CPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    if not is_main():
        warnings.simplefilter("ignore")  # the main process gives the same warnings
    yield
    # Not after an error: leaving would wait for processes that may never finish.
    wait()
    dist.destroy_process_group()


def world_size() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def is_main() -> bool:
    """Return whether this is the main process, which writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_this_machine() -> int:
    """Number of processes of the run that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def alone() -> Iterator[None]:
    """Context in which this process works as if it were the only one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def main_first() -> Iterator[None]:
    """Context that the main process runs before the others, to write files for them."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def wait() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        exchange([0])


def exchange(numbers: Sequence[int]) -> list[list[int]]:
    """Whole numbers of every process, one row each, by rank.

    Args:
        numbers: those of this process, as many as the others give.
    """
    if world_size() == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, dtype=torch.int64)
    table = torch.empty(world_size() * len(own), dtype=torch.int64)
    all_gather(table, own)
    return table.view(world_size(), -1).tolist()


def gather(value: T) -> list[T]:
    """Plain values and tensors of every process, by rank; tensors arrive on the CPU.

    Args:
        value: that of this process.
    """
    if world_size() == 1:
        return [value]
    packed = _pack(value)
    sizes = [size for (size,) in exchange([len(packed)])]
    largest = max(sizes)
    everything = torch.empty(world_size() * largest, dtype=torch.uint8)
    all_gather(everything, torch.cat([packed, packed.new_zeros(largest - len(packed))]))
    return [
        _unpack(part[:size]) for part, size in zip(everything.split(largest), sizes, strict=True)
    ]


def on_main(work: Callable[[], T]) -> T:
    """Run a function in the main process, and return its result in all.

    Args:
        work: the function; returns plain values and tensors.
    """
    if world_size() == 1:
        return work()
    packed = _pack(work()) if is_main() else torch.empty(0, dtype=torch.uint8)
    size = exchange([len(packed)])[0][0]
    if not is_main():
        packed = torch.empty(size, dtype=torch.uint8)
    dist.broadcast(packed, 0)
    found: T = _unpack(packed)
    return found


def _pack(value: Any) -> Tensor:
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _unpack(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)
