"""Device, precision and TF32 of a run, and the random generators of all devices."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vilmedic.distributed import processes
from vilmedic.distributed.launch import process_count
from vilmedic.errors import ConfigError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
ON_A_GPU = 2**27
"""Numbers per block on a GPU, 512 MiB in float32: from a quarter of that on, kernel launches are
negligible, and a loss that fits into one block computes nothing twice."""
_PLANNED_FOR_GPU = ContextVar("planned_for_gpu", default=False)
HOST = "host_"
"""Prefix of batch keys that are lists on the host, with one entry per sample."""
WORDS, IMAGES = HOST + "word_count", HOST + "image_count"


def pick_device(name: str | None) -> torch.device:
    """Return the configured device, or a CUDA GPU if there is one, or the CPU.

    A GPU named by its number becomes the current device, whose generator is saved and restored and
    for which memory is pinned.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, `mps` or None. Of several processes on a machine, each takes
            the GPU of its own number. `mps` is the GPU of an Apple computer; it is never taken
            unless named, as none of the numbers of this project were measured on one.

    Returns:
        A device that exists on this machine.

    Raises:
        ConfigError: the name is not a device, or this machine does not have it.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if not re.fullmatch("cpu|cuda(:[0-9]{1,3})?|mps", name):
        raise ConfigError(f"device: given '{name}', allowed: cpu, cuda, cuda:N, mps or null.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            "device: given 'mps', but torch finds no Apple GPU on this machine. Leave the key out "
            "to take what there is."
        )
    if kind == "mps" and process_count() > 1:
        raise ConfigError(
            "device: given 'mps', which is one GPU and cannot be shared by several processes. "
            "Start one process, or set device to cpu."
        )
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: given '{name}', but this machine has {torch.cuda.device_count()} CUDA "
            "devices. Leave the key out to take what there is."
        )
    if kind == "cuda" and process_count() > 1:
        if number:
            raise ConfigError(
                f"device: given '{name}', but each of several processes takes the GPU of its own "
                "number. Allowed: cpu, cuda or null."
            )
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if own >= torch.cuda.device_count():
            raise ConfigError(
                f"device: this machine has {torch.cuda.device_count()} CUDA devices, but more "
                "processes were started. Lower --nproc-per-node, or set device to cpu."
            )
        return torch.device("cuda", own)
    device = torch.device(name)
    if number:
        torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device, kept: str | None = None) -> str:
    """Return the configured precision, or with `auto` the one for the device.

    Of several processes the first one decides.

    Args:
        name: `fp32`, `bf16`, `fp16` or `auto`.
        device: where the run computes.
        kept: the value of `auto` when the run began.

    Returns:
        `fp32`, `bf16` or `fp16`.
    """
    if name != "auto":
        return name
    if kept in ("fp32", *HALF):
        return kept
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return processes.on_main(lambda: "bf16" if capable else "fp32")


def uses_tf32(device: torch.device, tf32: bool) -> bool:
    """Return whether products are computed in TF32 where a configuration allows it."""
    return tf32 and device.type == "cuda"


@contextmanager
def float32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Context for TF32 and cuDNN benchmarking of float32 products and convolutions on a GPU.

    TF32 uses 10 of the 23 mantissa bits and adds up in float32, which is several times as fast. A
    CPU is not affected. The settings are restored afterwards.

    Args:
        device: where the run computes.
        tf32: compute in TF32, and let cuDNN time its algorithms for each new shape and take the
            fastest; otherwise neither.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast context of a forward pass, or none for float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=HALF[precision])


@contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    """Context for using a model without gradients, in the arithmetic of `autocast`.

    This is inference mode, except for 16 bits: autocast does not cache converted weights in it.
    """
    without_gradients = torch.inference_mode if precision == "fp32" else torch.no_grad
    with without_gradients(), autocast(device, precision):
        yield


@contextmanager
def weights_converted_once(
    device: torch.device, precision: str, *models: nn.Module
) -> Iterator[None]:
    """Let all `inference` contexts within share the 16-bit weights of the first one.

    Autocast caches them until its outermost context ends, so an empty one is put around. It caches
    only weights that require gradients, so frozen ones require them within this context. Weights
    must not change within.

    Args:
        device: where the models are.
        precision: `fp32` converts nothing.
        models: the models that are used within.
    """
    if precision == "fp32":
        yield
        return
    weights = [weight for model in models for weight in model.parameters()]
    frozen = [
        weight for weight in weights if weight.is_floating_point() and not weight.requires_grad
    ]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(False)


def block_numbers(device: torch.device, on_cpu: int) -> int:
    """Return the size of the largest tensor of a computation in blocks.

    Args:
        device: where it is computed.
        on_cpu: the best size on a CPU, which depends on the computation.
    """
    return on_cpu if device.type == "cpu" and not _PLANNED_FOR_GPU.get() else ON_A_GPU


@contextmanager
def blocks_of_a_gpu() -> Iterator[None]:
    """Use GPU block sizes for a step that is only planned, on a CPU."""
    before = _PLANNED_FOR_GPU.set(True)
    try:
        yield
    finally:
        _PLANNED_FOR_GPU.reset(before)


def constants(
    make: Callable[..., tuple[Tensor, ...]], *numbers: Any, like: Tensor
) -> tuple[Tensor, ...]:
    """Return tensors computed from numbers, cached for each device.

    A copy to a GPU in every step would wait each time for all queued work.

    Args:
        make: makes them on the CPU.
        numbers: its arguments.
        like: a tensor where they are wanted.
    """
    # Fake tensors of a planned step must not be reused by another plan.
    return _made(make, numbers, like.device, getattr(like, "fake_mode", None))


@lru_cache(maxsize=64)
def _made(
    make: Callable[..., tuple[Tensor, ...]], numbers: Any, device: torch.device, plan: object
) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # training uses them too
        return tuple(value.to(device) for value in make(*numbers))


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch to the device, without waiting if its memory is pinned.

    Memory is pinned only for CUDA; elsewhere an asynchronous copy could read memory that has since
    been overwritten.

    Numbers that determine shapes are counted before: reading them from a GPU would wait for all its
    queued work. So on a GPU a batch also has lists with a number per sample: words of its report,
    including special tokens, in `host_word_count`, and images in `host_image_count`.
    """
    queued = device.type != "mps"
    moved = {
        key: value.to(device, non_blocking=queued) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    if device.type != "cpu" and "word_ids" in batch:
        moved[WORDS] = [max(row) + 1 for row in batch["word_ids"].tolist()]
    if device.type != "cpu" and "images_mask" in batch:
        moved[IMAGES] = [sum(row) for row in batch["images_mask"].tolist()]
    return moved


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
    """Restore the state that `random_state` returned."""
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
    """Restore the states that `device_states` returned."""
    for device, state in states:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.mps.set_rng_state(state)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Context whose random draws, on the CPU and a device, do not affect later ones."""
    states = device_states({device})
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            restore_device_states(states)


def _cuda_states() -> list[torch.Tensor]:
    """Return the generator state of the current GPU; reading others would initialise them too."""
    return [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
