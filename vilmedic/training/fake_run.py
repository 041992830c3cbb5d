"""Simulated training step on fake tensors: peak memory and operation counts.

Everything runs as it does in training, model, loss, backward pass and optimizer, but on fake
tensors (`torch._subclasses.FakeTensorMode`): shapes and lifetimes are those of a real step, and
nothing is computed. The device is a fake CPU, so that a plan is the same on every machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vilmedic.config.sections import TrainorSection
from vilmedic.device import blocks_of_a_gpu
from vilmedic.training.averaged_weights import AveragedWeights
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.step import TrainingStep

WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE = "weights", "gradients", "optimizer", "averaged weights"
ACTIVATIONS = "activations"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, ACTIVATIONS)
BLOCK = 512  # bytes of which memory is given out in multiples
MADE = ("arange", "empty", "full", "ones", "rand", "randint", "randperm", "zeros")
NOTHING_TO_RUN = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Operation:
    """An operation of a step.

    Args:
        flop: floating-point operations of a product or convolution, 0 of any other.
        dtype: of what is multiplied.
        moved: bytes that are read and written.
    """

    flop: float
    dtype: torch.dtype
    moved: float


@dataclass(frozen=True)
class FakeRun:
    """Cost of a step.

    Args:
        held: bytes at the moment when most are held, by `PARTS`.
        operations: everything that was computed, in order.
    """

    held: dict[str, int]
    operations: list[Operation] = field(repr=False)

    @property
    def peak(self) -> int:
        """Bytes held at the peak."""
        return sum(self.held.values())

    @property
    def flop(self) -> float:
        """Floating-point operations of the products and convolutions."""
        return sum(operation.flop for operation in self.operations)


class FakeTraining:
    """A training whose steps run on fake tensors.

    Args:
        model: as `prepare_network` leaves it, on the CPU; its weights are gone afterwards.
        prepare: of the data set.
        section: how the model is trained.
        gpu: whether blocks are as large as on a GPU and attention keeps what it keeps there.
    """

    def __init__(
        self,
        model: Any,
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        section: TrainorSection,
        *,
        gpu: bool,
    ) -> None:
        self._model, self._prepare, self._section = model.train(), prepare, section
        self._gpu = gpu
        # What is small and decides on shapes, ids and masks, keeps its numbers.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._ledger = _Ledger()
        parts = [model, *held_networks(model)]
        with self._mode, self._ledger:
            for part in parts:
                _empty(part)
                for value in [*part.parameters(), *part.buffers()]:
                    self._ledger.assign(value, WEIGHTS)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._ledger.assign_gradient)

    def step(self, group: list[dict[str, Any]]) -> FakeRun:
        """Return the cost of the second of two steps; the first creates the optimizer state.

        Args:
            group: batches as the loader gives them; those of images need no numbers.
        """
        model, section, ledger = self._model, self._section, self._ledger
        model.zero_grad(set_to_none=True)
        with ExitStack() as modes:
            if self._gpu:
                modes.enter_context(blocks_of_a_gpu())
                modes.enter_context(_AttentionOfAGPU())
            modes.enter_context(self._mode)
            modes.enter_context(ledger)
            batches = [
                {key: _without_numbers(value) for key, value in batch.items()} for batch in group
            ]
            optimizer = make_optimizer(model, section)
            average = None if section.ema is None else AveragedWeights(model, section.ema)
            if average is not None:
                for value in average.state_dict().values():
                    ledger.assign(value, AVERAGE)
            step = TrainingStep(model, self._prepare, optimizer, section, CPU)
            for number in (1, 2):
                ledger.restart()
                result = step(batches)
                if average is not None:
                    average.update(number, result.taken)
                for value in tree_leaves(list(optimizer.state.values())):
                    if isinstance(value, Tensor):
                        ledger.assign(value, OPTIMIZER)
        return FakeRun(ledger.peak, ledger.operations)


def held_networks(model: nn.Module) -> list[nn.Module]:
    """Frozen networks that a model uses in a step and that are no parts of it, loaded."""
    found = [getattr(module, "held_network", None) for module in model.modules()]
    return [network for get in found if get is not None and (network := get()) is not None]


class _AttentionOfAGPU(TorchFunctionMode):
    """Attention by the kernel of a GPU, which keeps no weights; with dropout a CPU keeps them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `scaled_dot_product_attention`."""
    bias = None
    if attn_mask is not None:
        seen = torch.zeros(attn_mask.shape, dtype=query.dtype)
        bias = seen.expand(*query.shape[:2], query.shape[2], key.shape[2])
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]
    return output


class _Ledger(TorchDispatchMode):
    """Tracks the memory that is held and the operations that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(PARTS, 0)
        self.peak = dict(self.now)
        self.operations: list[Operation] = []
        self._entries: dict[int, list[Any]] = {}

    def restart(self) -> None:
        """Reset the peak and the operations, but not the memory held."""
        self.peak, self.operations = dict(self.now), []

    def assign(self, tensor: Tensor, part: str) -> None:
        """Record the purpose of a tensor's memory."""
        entry = self._entry(tensor)
        if entry is not None:
            size, before = entry
            self.now[before] -= size
            self.now[part] += size
            entry[1] = part

    def assign_gradient(self, parameter: Tensor) -> None:
        """Record that a parameter has its gradient."""
        if parameter.grad is not None:
            self.assign(parameter.grad, GRADIENTS)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(inputs[0]):
            # Whether a step is taken: it is. Counts of steps, of an optimizer: the first.
            return True if inputs[0].dtype == torch.bool else 1
        if _has_numbers(func, inputs, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket.__name__ in INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        output = func(*args, **kwargs)
        outputs = [one for one in tree_leaves(output) if isinstance(one, Tensor)]
        new = sum(self._enter(one) for one in outputs)
        if new and sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)
        self._count(func, args, kwargs, output, inputs, outputs)
        return output

    def _enter(self, tensor: Tensor) -> bool:
        return _is_fake(tensor) and self._entry(tensor) is not None

    def _entry(self, tensor: Tensor) -> list[Any] | None:
        """Size and part of a tensor's memory; it is entered if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            entry = self._entries[key] = [size, ACTIVATIONS]
            self.now[ACTIVATIONS] += size
            weakref.finalize(storage, self._leave, key)
        return entry

    def _leave(self, key: int) -> None:
        size, part = self._entries.pop(key)
        self.now[part] -= size

    def _count(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        name = func.overloadpacket
        if func.namespace != "aten" or func.is_view or name.__name__ in NOTHING_TO_RUN:
            return
        formula = flop_registry.get(name)
        flop = float(formula(*args, **kwargs, out_val=output)) if formula else 0.0
        changed = [one for one in inputs if func._schema.is_mutable]
        moved = sum(one.numel() * one.element_size() for one in [*inputs, *(outputs or changed)])
        dtype = next((one.dtype for one in inputs if one.is_floating_point()), torch.float32)
        self.operations.append(Operation(flop, dtype, float(moved)))


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _has_numbers(func: Any, inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether an operation runs on real numbers: its inputs have them, or it is small."""
    if inputs:
        return not any(map(_is_fake, inputs))
    name = func.overloadpacket.__name__
    if name not in MADE:
        return False
    dtype = kwargs.get("dtype")
    if name in ("arange", "randint", "randperm") and dtype is None:
        return True
    if name == "rand":  # one per sample
        return len(args[0]) == 1
    return dtype is not None and not dtype.is_floating_point


def _places(indices: Any) -> list[Any]:
    """Indices in which masks are the places that they choose: how many these are is then known."""
    places: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not _is_fake(index):
            with unset_fake_temporarily():
                places += index.nonzero().unbind(1)
        else:
            places.append(index)
    return places


def _without_numbers(value: Any) -> Any:
    """Images as fake tensors; ids, masks and whatever else is small as they are."""
    if isinstance(value, Tensor) and value.ndim > 2:
        return torch.empty(value.shape, dtype=value.dtype)
    return value


def _empty(model: nn.Module) -> None:
    """Put fake tensors of the same layout instead of all weights and buffers."""
    fakes: dict[int, Any] = {}

    def fake(value: Tensor) -> Any:
        if id(value) not in fakes:
            made: Tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            if isinstance(value, nn.Parameter):
                made = nn.Parameter(made, requires_grad=value.requires_grad)
            fakes[id(value)] = (made, value)  # the value as well, for ids are given again
        return fakes[id(value)][0]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in list(own.items()):
                if value is not None:
                    own[name] = fake(value)
