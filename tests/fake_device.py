"""A fake GPU for any machine: tensors with shape and type, but without values.

It is torch's device `meta`. All operations of a step on it can be recorded, including those that
would make the host wait for a real GPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2")
COPIES = ("_to_copy", "copy_", "_copy_from")


class _Autocast:
    """Autocast for the fake device; torch's own works on real devices only."""

    dtype: torch.dtype | None = None

    def __init__(self, dtype: torch.dtype | None, enabled: bool) -> None:
        self._own = dtype if enabled else None

    def __enter__(self) -> None:
        self._before, _Autocast.dtype = _Autocast.dtype, self._own

    def __exit__(self, *_: object) -> None:
        _Autocast.dtype = self._before


@contextmanager
def fake_device() -> Iterator[None]:
    """Make torch treat the fake device as one that trains: fused updates, autocast."""
    real, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    def autocast(kind: str, dtype: Any = None, enabled: bool = True, **options: Any) -> Any:
        if kind == DEVICE.type:
            return _Autocast(dtype, enabled)
        return real(kind, dtype=dtype, enabled=enabled, **options)

    def is_enabled(kind: str = "cuda") -> bool:
        return _Autocast.dtype is not None if kind == DEVICE.type else enabled(kind)

    def dtype_of(kind: str) -> Any:
        return _Autocast.dtype or torch.bfloat16 if kind == DEVICE.type else dtype(kind)

    with (
        mock.patch("torch.autocast", autocast),
        mock.patch("torch.is_autocast_enabled", is_enabled),
        mock.patch("torch.get_autocast_dtype", dtype_of),
        mock.patch(
            "torch.optim.optimizer._get_fused_kernels_supported_devices",
            return_value=[DEVICE.type, "cpu"],
        ),
    ):
        yield


class Waits(TorchDispatchMode):
    """Records the lines of the package at which the host would wait for a GPU.

    These read a value, index with a mask, or copy between host and device in a way that waits
    until all earlier work is done. Tensors created from Python numbers count as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = _Made(self)
        self.called: Counter[str] = Counter()
        self.seen: list[str] = []

    def __enter__(self) -> Waits:
        self.made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.called[name] += 1
        if _waits(name, args, kwargs or {}):
            self.seen.append(f"{function} at {_line()}")
        if name == "_fused_sgd_" and args[0][0].device == DEVICE:
            return None  # it has no meta implementation and returns nothing
        return function(*args, **(kwargs or {}))


class _Made(TorchFunctionMode):
    """Records tensors created from Python numbers, which are not dispatched."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and (
            found.device == DEVICE
        ):
            self._waits.seen.append(f"{function.__name__} at {_line()}")
        return found


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    tensors = [one for one in args if isinstance(one, torch.Tensor)]
    if name in READS or name == "lift_fresh":
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        places = [one for one in args[1] if one is not None]
        masks = (torch.bool, torch.uint8)
        return any(one.dtype in masks or one.device != tensors[0].device for one in places)
    if name in COPIES:
        source = tensors[-1].device
        target = torch.device(kwargs.get("device") or tensors[0].device)
        # A copy from host to device may be queued without waiting.
        queued = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
        return target.type != source.type and not (queued and source.type == "cpu")
    return False


def _line() -> str:
    """The innermost running line of the package."""
    frames = [one for one in traceback.extract_stack() if "/vilmedic/" in one.filename]
    if not frames:
        return "?"
    return f"{frames[-1].filename.rpartition('/vilmedic/')[2]}:{frames[-1].lineno}"
