"""Contrastive gradients in constant memory: one chunk's graph at a time (Gao et al. 2021).

"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983: a
contrastive loss needs the features of the whole batch, but its gradient reaches the encoders only
through them. So every chunk is encoded without a graph, the loss is taken and differentiated with
respect to the features, and every chunk is then encoded once more, with a graph that lives until
its part of the gradient is back-propagated. Random numbers and buffers are those of the first
time, so the gradient equals that of keeping all graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vilmedic.random_state import device_states, restore_device_states

Features = dict[str, Tensor]
Encode = Callable[[], Features]


def encode_in_constant_memory(module: nn.Module, chunks: Sequence[Encode]) -> Features:
    """Encode chunk by chunk, now without a graph and once more when the gradient arrives.

    The second time, gradients are added to the `grad` of the parameters directly. Data-parallel
    wrappers that wait for hooks of parameters would count them once a chunk: reduce gradients
    after the backward pass instead.

    Args:
        module: what the chunks are encoded with; its buffers are those of a single pass afterwards.
        chunks: functions that encode the consecutive parts of a batch, each with the same keys. A
            scalar, such as a learned temperature, is the same in all of them.

    Returns:
        The features of the batch, concatenated, with all floating-point ones differentiable.

    Raises:
        ValueError: the features of two chunks differ in more than the number of samples.
    """
    encoding = _Encoding(module, chunks)
    # The chunks are not tensors, so autograd would see no input that needs a gradient, and never
    # call backward. The trigger is such an input; its own gradient is not used.
    trigger = torch.zeros((), requires_grad=True)
    tensors = _Replayed.apply(trigger, encoding)
    return dict(zip(encoding.names, tensors, strict=True))


class _Replayed(torch.autograd.Function):
    """Features whose backward pass encodes again."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, encoding: _Encoding) -> tuple[Tensor, ...]:
        ctx.encoding = encoding
        ctx.set_materialize_grads(False)
        features = encoding.first_pass()
        fixed = [value for value in features if not value.is_floating_point()]
        ctx.mark_non_differentiable(*fixed)
        return tuple(features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        ctx.encoding.second_pass(gradients)
        return None, None


class _Encoding:
    """The two passes over the chunks of a batch."""

    def __init__(self, module: nn.Module, chunks: Sequence[Encode]) -> None:
        self.module = module
        self.chunks = chunks
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.random: list[_RandomState] = []
        self.buffers: list[Tensor] = []
        self.devices = {value.device for value in module.parameters()}
        self.autocast = _autocast_now(self.devices)

    def first_pass(self) -> list[Tensor]:
        """Encode all chunks without a graph, remembering what they depended on."""
        # Batch normalisation reads and updates running statistics: the second pass has to start
        # from the same ones, and leave those of a single pass behind.
        self.buffers = [buffer.clone() for buffer in self.module.buffers()]
        parts: list[Features] = []
        with torch.no_grad():
            for encode in self.chunks:
                self.random.append(_RandomState(self.devices))
                features = encode()
                # As copies: a feature may share memory with a parameter or with the batch.
                parts.append({name: value.detach().clone() for name, value in features.items()})
        # What autocast has converted without a graph must not be taken up by what needs one.
        torch.clear_autocast_cache()
        self.names = list(parts[0])
        self.sizes = [_size(part) for part in parts]
        joined = join(parts)
        return [joined[name] for name in self.names]

    def second_pass(self, gradients: Sequence[Tensor | None]) -> None:
        """Encode every chunk again and back-propagate its rows of the gradients."""
        after = [buffer.clone() for buffer in self.module.buffers()]
        now = _RandomState(self.devices)
        _refill(self.module, self.buffers)
        start = 0
        try:
            for encode, random, size in zip(self.chunks, self.random, self.sizes, strict=True):
                # The same dropout masks as in the first pass: the gradient of the loss was taken at
                # those features. Backward runs outside of the caller's autocast, so it is reopened.
                random.restore()
                with torch.enable_grad(), self.autocast():
                    features = encode()
                outputs, parts = [], []
                for name, gradient in zip(self.names, gradients, strict=True):
                    # A scalar such as a temperature is part of every chunk, but its gradient is
                    # that of the whole batch: it is propagated once, with the first chunk.
                    shared = gradient is not None and gradient.ndim == 0
                    if gradient is None or not features[name].requires_grad or (shared and start):
                        continue
                    outputs.append(features[name])
                    parts.append(gradient if shared else gradient[start : start + size])
                # Frees the graph of this chunk before the next one is built.
                if outputs:
                    torch.autograd.backward(outputs, parts)
                start += size
        finally:
            # As if there had been one pass: what follows draws the same random numbers, and running
            # statistics have been updated once.
            now.restore()
            _refill(self.module, after)


def join(chunks: list[Features]) -> Features:
    """Concatenate the features of consecutive chunks along the batch.

    A scalar, such as a learned temperature, is the same in every chunk and is kept once.

    Args:
        chunks: the features of each chunk, emptied on the way so that no two copies are held.

    Raises:
        ValueError: the features of two chunks differ in more than the number of samples.
    """
    if len(chunks) == 1:
        return chunks[0]
    joined: Features = {}
    for name in list(chunks[0]):
        parts = [chunk.pop(name) for chunk in chunks]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = " and ".join(sorted({str(list(part.shape)) for part in parts}))
            raise ValueError(
                f"the chunks of a batch gave '{name}' as {shapes}; what encode returns must have "
                "one shape for every part of a batch, the number of samples aside."
            )
        joined[name] = torch.cat(parts) if parts[0].ndim else parts[0]
    return joined


def _size(features: Features) -> int:
    """Number of samples in a chunk, by its features."""
    return next(len(value) for value in features.values() if value.ndim)


class _RandomState:
    """The state of the generators of the CPU and of the GPUs in use."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = device_states(devices)

    def restore(self) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.cpu)
        restore_device_states(self.devices)


def _autocast_now(devices: set[torch.device]) -> Callable[[], AbstractContextManager[Any]]:
    """A function that opens an autocast context like the one that is open now."""
    kind = next(iter(devices)).type
    enabled = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def _refill(module: nn.Module, values: Sequence[Tensor]) -> None:
    for buffer, value in zip(module.buffers(), values, strict=True):
        # Through `data`, as layers do themselves: a graph that is kept elsewhere stays usable.
        buffer.data.copy_(value)
