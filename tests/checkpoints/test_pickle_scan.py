from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilmedic.checkpoints.pickle_scan import Refused, scan


class Call:
    """Pickles as a function call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def look(value: Any, allowed: tuple[str, ...] = (), room: int = 1000) -> None:
    scan(io.BytesIO(pickle.dumps(value, protocol=2)), allowed, lambda key, size: size <= room)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "text", 2**70, ("b", "c", "d", "e")], ("k", 1): {}},
        OrderedDict(a=1),
        OrderedDict([("a", [1])]),
        {1, 2},
        b"bytes",
        1j,
        (3, tuple(range(625)), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_pass(value: Any) -> None:
    look(value)


@pytest.mark.parametrize(
    "value",
    [
        Call(bytearray, 10**12),
        Call(torch.Tensor, 10**9),
        Call(torch.FloatTensor, 10**9),
        Call(torch.zeros, 10**9),
        Call(str, [1]),
        Call(list, (1,)),
        Call(eval, "1"),
    ],
    ids=lambda value: value.function.__name__,
)
def test_calls_that_allocate_or_run_code_are_refused(value: Any) -> None:
    with pytest.raises(Refused, match="neither a tensor nor a plain value"):
        look({"model": [value]})


def test_allowed_names_may_be_called() -> None:
    look(Call(complex, 1.0, 2.0))
    look(Call(bytearray, 3), allowed=("__builtin__.bytearray",))


def test_results_of_calls_cannot_be_called() -> None:
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R)R."
    with pytest.raises(Refused, match="call of a call"):
        scan(io.BytesIO(pickled), (), lambda key, size: True)


def tuples(depth: int, width: int = 2) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ("x",)
    for _ in range(depth):
        value = (value,) * width
    return value


@pytest.mark.parametrize(
    "value",
    [
        [tuples(60)],
        [tuples(30)],
        [tuples(100, width=1)],
        {tuples(5): 1},
        Call(set, [tuples(17)] * 4),
        Call(OrderedDict, [[tuples(17), 1]] * 4),
    ],
    ids=["60 levels", "30 levels", "a long chain", "a key", "a set", "an ordered dict"],
)
def test_tuples_with_exponential_hash_time_are_refused(value: Any) -> None:
    with pytest.raises(Refused, match=r"tuple|more than"):
        look(value)


def test_bytes_in_odd_encodings_are_refused() -> None:
    look(Call(codecs.encode, "abc", "latin1"))
    with pytest.raises(Refused, match="encoding"):
        look(Call(codecs.encode, "abc", "idna"))


def test_storages_larger_than_the_file_are_refused() -> None:
    class Saved(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", self.count) if value == 0 else None

    for count, fine in ((250, True), (251, False), (10**12, False), (-1, False)):
        stream = io.BytesIO()
        pickler = Saved(stream, protocol=2)
        pickler.count = count  # type: ignore[attr-defined]
        pickler.dump([0])
        stream.seek(0)
        if fine:
            scan(stream, (), lambda key, size: key == "0" and size <= 1000)
        else:
            with pytest.raises(Refused, match="which the file does not hold"):
                scan(stream, (), lambda key, size: key == "0" and size <= 1000)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02", b"\x80\x02h\x05.", b"\x80\x02R.", b"\x80\x02u.", b"no pickle", b"a."],
    ids=repr,
)
def test_non_pickles_are_an_error(content: bytes) -> None:
    with pytest.raises((ValueError, LookupError)):
        scan(io.BytesIO(content), (), lambda key, size: True)
