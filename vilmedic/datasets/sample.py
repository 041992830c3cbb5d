"""What identifies a sample, and the random numbers that belong to it.

Whatever is drawn for a sample is a function of the run's seed, the epoch and the sample's line, so
neither the number of workers nor a restart changes the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SampleKey:
    """What a loader asks a data set for.

    Args:
        index: position in the data set, from 0 to `len(dataset) - 1`.
        epoch: the pass over the data, from 0.
    """

    index: int
    epoch: int = 0


def stable_seed(purpose: str, *numbers: int) -> int:
    """A 64-bit seed that is the same on every machine and in every process.

    Args:
        purpose: what is drawn (`image`, `shuffle`), so that two uses do not share their numbers.
        numbers: what the draw depends on: seed, epoch, line, view.
    """
    text = ":".join([purpose, *(str(number) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block on torch's CPU random numbers from `seed`; the caller's numbers go on unchanged.

    `torch.manual_seed` would also reseed the accelerators, which the training loop is using.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
