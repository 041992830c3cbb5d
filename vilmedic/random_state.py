"""Saving and restoring of random generator states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The current state, such that `restore_random_state` continues every stream exactly."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [
            str(kind),
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(),
    }
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo whatever was drawn since `random_state` returned this state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def device_states(devices: set[torch.device]) -> list[tuple[torch.device, torch.Tensor]]:
    """The state of the generator of each GPU; see `restore_device_states`."""
    states = []
    for device in devices:
        if device.type == "cuda":
            states.append((device, torch.cuda.get_rng_state(device)))
        elif device.type == "mps":
            states.append((device, torch.mps.get_rng_state()))
    return states


def restore_device_states(states: list[tuple[torch.device, torch.Tensor]]) -> None:
    """Go back to what `device_states` gave."""
    for device, state in states:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.mps.set_rng_state(state)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """A stretch whose draws on the CPU and on a device change nothing that is drawn after it."""
    states = device_states({device})
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            restore_device_states(states)


def _cuda_states() -> list[torch.Tensor]:
    """The state of the GPU in use: looking at those of other processes would open them as well."""
    return [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
