"""Static analysis of a `torch.save` pickle, without building its objects.

`torch.load(weights_only=True)` runs no code of a file, but it allocates what a file claims:
storages larger than the file, a `bytearray` of any size, nested tuples that take forever to hash.
Here the instructions are followed with stand-ins for their results.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Sequence
from typing import Any, BinaryIO

MOST_INSTRUCTIONS = 4_000_000  # the largest real checkpoint has some hundred thousand
DEEPEST = 64
LARGEST_KEY = 16
LARGEST_TUPLE = 1_000_000  # values, those of the tuples within it included

CALLED = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.Size",
        "torch.device",
        "_codecs.encode",
        "builtins.set",
        "__builtin__.set",
        "builtins.complex",
        "__builtin__.complex",
    }
)
"""Calls that are always allowed: none of them allocates a size that the file claims."""
HASHED = ("collections.OrderedDict", "builtins.set", "__builtin__.set")
"""Calls that hash their arguments."""


class Refused(Exception):
    """A pickle with more than a checkpoint needs; the message continues a sentence."""


class _Global:
    """A name of a module."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Held:
    """A tuple, a list, a dict or what a call returned.

    Args:
        items: the members of a tuple.
    """

    def __init__(self, items: tuple[Any, ...] = ()) -> None:
        self.items = items
        self.depth, self.size = 1, 0
        self.add(items)

    def add(self, items: Sequence[Any]) -> None:
        """Add members; for a list only their number is kept."""
        inner = [item for item in items if isinstance(item, _Held)]
        self.size += len(items) + sum(item.size for item in inner)
        if self.items:
            self.depth = 1 + max((item.depth for item in inner), default=0)
            if self.depth > DEEPEST or self.size > LARGEST_TUPLE:
                raise Refused("holds tuples within tuples without end")


def scan(stream: BinaryIO, allowed: Collection[str], fits: Callable[[str, int], bool]) -> None:
    """Scan one pickle to its end.

    Args:
        stream: stands at its beginning, and afterwards behind it.
        allowed: names of what may be called besides `CALLED`.
        fits: returns whether the file holds that many bytes for the storage of a key.

    Raises:
        Refused: it would allocate or call what no checkpoint needs to.
        Exception: it is not a pickle, or one that `torch.load` cannot read either.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
        name = code.name
        if count > MOST_INSTRUCTIONS:
            raise Refused(f"holds more than {MOST_INSTRUCTIONS:,} plain values")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _PLAIN:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(_Global(argument.replace(" ", ".")))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(_Held(tuple(since_mark())))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            number = int(name[-1])
            stack[-number:] = [_Held(tuple(stack[-number:]))]
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append(_Held())
        elif name in ("REDUCE", "NEWOBJ"):
            given = stack.pop()
            _check_call(stack[-1], given, allowed)
            stack[-1] = _Held()
        elif name == "BINPERSID":
            _check_storage(stack.pop(), fits)
            stack.append(_Held())
        elif name == "BUILD":
            stack.pop()
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].add([item])
        elif name == "SETITEM":
            _check_key(stack[-2])
            del stack[-2:]
        elif name == "SETITEMS":
            for key in since_mark()[::2]:
                _check_key(key)
        elif name == "APPENDS":
            items = since_mark()
            stack[-1].add(items)
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"unsupported instruction {name}")


_PLAIN = frozenset(("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT"))
_PLAIN |= {"BINUNICODE", "SHORT_BINSTRING", "LONG1"}
_BYTES = {
    "ComplexDouble": 16,
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool", "Untyped"), 1),
}


def _check_call(called: Any, given: Any, allowed: Collection[str]) -> None:
    name = called.name if isinstance(called, _Global) else "call of a call"
    first = given.items[0] if isinstance(given, _Held) and given.items else None
    if name in HASHED and isinstance(first, _Held) and first.size > LARGEST_TUPLE:
        raise Refused(f"holds a '{name}' of more than {LARGEST_TUPLE:,} values")
    if name == "_codecs.encode" and given.items[1:] != ("latin1",):
        raise Refused("holds bytes in an encoding that torch does not write")
    if name not in CALLED and name not in allowed:
        raise Refused(
            f"holds a '{name}', which is neither a tensor nor a plain value. Nothing of such a "
            "file is read: it could run any program"
        )


def _check_key(key: Any) -> None:
    if isinstance(key, _Held) and key.size > LARGEST_KEY:
        raise Refused("has a key that is a tuple of many values")


def _check_storage(record: Any, fits: Callable[[str, int], bool]) -> None:
    """Compare the record of a storage, `(storage, type, key, device, count)`, with the file."""
    items = record.items if isinstance(record, _Held) else ()
    if len(items) < 5 or not isinstance(items[1], _Global) or not isinstance(items[4], int):
        raise ValueError("a storage that is described in an unknown way")
    _, kind, key, _, count = items[:5]
    size = count * _bytes_of(kind.name)
    if count < 0 or not fits(_text(key), size):
        raise Refused(f"claims a tensor of {size:,} bytes, which the file does not hold")


def _bytes_of(kind: str) -> int:
    """Bytes of a number in a storage of a type, `torch.FloatStorage` say."""
    name = kind.rpartition(".")[2].removesuffix("Storage")
    if name not in _BYTES:
        raise ValueError(f"unknown storage {kind}")
    return _BYTES[name]


def _text(key: Any) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else str(key)
