"""What a configuration value may be, read from the text of an annotation."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import Any

import griffe

from vilmedic.config import types
from vilmedic.config.sources import find_object, resolve
from vilmedic.registry import own_packages


@dataclass(frozen=True)
class Basic:
    """A plain value: null, bool, int, float, text, path, any, or foreign.

    Foreign is what no configuration can hold (a tensor, a function); alone it is never judged.
    """

    name: str


@dataclass(frozen=True)
class Choice:
    """One of some literal values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class ListOf:
    """A list of any length; `container` is what a constructor gets: list, tuple or set."""

    item: Type
    container: str = "list"


@dataclass(frozen=True)
class TupleOf:
    """A list of a fixed length."""

    items: tuple[Type, ...]


@dataclass(frozen=True)
class MapOf:
    """A mapping from text."""

    value: Type


@dataclass(frozen=True)
class AnyOf:
    """A value of any of several types."""

    options: tuple[Type, ...]


@dataclass(frozen=True)
class Instance:
    """A mapping that is built into an object of a class of this package or of a plugin."""

    path: str


@dataclass(frozen=True)
class Marked:
    """A type with a mark of `vilmedic.config.types`."""

    base: Type
    mark: Mark


Type = Basic | Choice | ListOf | TupleOf | MapOf | AnyOf | Instance | Marked
Mark = (
    types.NameIn
    | types.OptionsOf
    | types.Calls
    | types.ConfigOf
    | types.AtLeast
    | types.Above
    | types.Below
    | types.AtMost
    | types.Between
    | types.Lengths
    | types.AsLongAs
    | types.FolderName
    | types.Matching
    | types.UsedWith
    | types.Within
    | types.Overruled
)

ANY = Basic("any")
NUMBERS = (Basic("int"), Basic("float"))
LARGEST = 2**63 - 1
"""The largest whole number: what 64 bits hold, as torch and numpy count."""
_MARKS = {
    f"{types.__name__}.{mark.__name__}": mark
    for mark in (
        types.NameIn,
        types.OptionsOf,
        types.Calls,
        types.ConfigOf,
        *types.BOUNDS,
        types.Lengths,
        types.AsLongAs,
        types.FolderName,
        types.Matching,
        types.UsedWith,
        types.Within,
        types.Overruled,
    )
}
_RUNTIME = f"{types.__name__}.Runtime"
_BASIC = {
    "None": "null",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "text",
    "pathlib.Path": "path",
    "os.PathLike": "path",
    "typing.Any": "any",
    "object": "any",
    "numbers.Number": "float",
    "numbers.Real": "float",
    "numbers.Integral": "int",
}
_LISTS = {
    "list": "list",
    "typing.List": "list",
    "tuple": "tuple",
    "typing.Tuple": "tuple",
    "set": "set",
    "frozenset": "set",
    **{
        f"{module}.{name}": "list"
        for module in ("typing", "collections.abc")
        for name in ("Sequence", "Iterable", "Collection", "MutableSequence")
    },
}
_MAPS = {
    "dict",
    "typing.Dict",
    *(f"{module}.{name}" for module in ("typing", "collections.abc") for name in ("Mapping",)),
}


def parse_annotation(text: str | None, module: griffe.Module) -> Type:
    """The type that an annotation stands for.

    Args:
        text: the annotation as written; None when there is none.
        module: the module whose imports give its names their meaning.

    Returns:
        The type; what is not understood may be anything.
    """
    if text is None:
        return ANY
    try:
        return _Parser(module).type(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        return ANY


def is_runtime(text: str | None, module: griffe.Module) -> bool:
    """Whether an annotation holds `Runtime[...]`."""
    if text is None or "Runtime" not in text:
        return False
    try:
        tree = ast.parse(text.strip("'\""), mode="eval")
    except SyntaxError:
        return False
    names = (_name(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    return any(resolve(module, name) == _RUNTIME for name in names if name)


def is_number(given: Any) -> bool:
    """Whether a value is a number, which a truth value is not."""
    return isinstance(given, int | float) and not isinstance(given, bool)


def is_usable(given: Any) -> bool:
    """Whether every number in a value is finite and fits into 64 bits."""
    if isinstance(given, dict):
        return all(is_usable(one) for one in given.values())
    if isinstance(given, list):
        return all(is_usable(one) for one in given)
    if not is_number(given):
        return True
    return math.isfinite(given) if isinstance(given, float) else -LARGEST <= given <= LARGEST


def plain(kind: Type) -> Type:
    """A type without its marks."""
    return plain(kind.base) if isinstance(kind, Marked) else kind


def options(kind: Type) -> tuple[Type, ...]:
    """The alternatives that a type consists of."""
    if isinstance(kind, AnyOf):
        return tuple(option for part in kind.options for option in options(part))
    return (kind,)


def instance_of(kind: Type) -> Instance | None:
    """The class that a mapping of a type becomes; None when it stays a mapping."""
    found = [one for one in options(plain(kind)) if isinstance(one, Instance)]
    return found[0] if found else None


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and _name(node.value):
        return f"{_name(node.value)}.{node.attr}"
    return ""


class _Parser:
    def __init__(self, module: griffe.Module) -> None:
        self.module = module

    def type(self, node: ast.expr) -> Type:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return self.type(ast.parse(node.value.strip(), mode="eval").body)
            return Basic("null") if node.value is None else ANY
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return AnyOf((self.type(node.left), self.type(node.right)))
        if isinstance(node, ast.Subscript):
            return self.subscript(node)
        name = _name(node)
        return self.named(resolve(self.module, name)) if name else ANY

    def named(self, path: str) -> Type:
        if path in _BASIC:
            return Basic(_BASIC[path])
        if path in _LISTS:
            return ListOf(ANY, _LISTS[path])
        if path in _MAPS:
            return MapOf(ANY)
        if path.partition(".")[0] not in own_packages():
            return Basic("foreign")
        found = find_object(path)
        if isinstance(found, griffe.Class):
            return Instance(found.path)
        if isinstance(found, griffe.Attribute) and found.value is not None:
            return parse_annotation(str(found.value), found.module)
        return Basic("foreign")

    def subscript(self, node: ast.Subscript) -> Type:
        path = resolve(self.module, _name(node.value)).replace("typing_extensions.", "typing.")
        inner = node.slice
        parts = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
        if path == "typing.Optional":
            return AnyOf((self.type(parts[0]), Basic("null")))
        if path == "typing.Union":
            return AnyOf(tuple(self.type(part) for part in parts))
        if path == "typing.Literal":
            return Choice(tuple(ast.literal_eval(part) for part in parts))
        if path == "typing.Annotated":
            kind = self.type(parts[0])
            for part in parts[1:]:
                mark = self.mark(part)
                kind = kind if mark is None else Marked(kind, mark)
            return kind
        if path in _LISTS:
            if _LISTS[path] == "tuple" and not (
                isinstance(parts[-1], ast.Constant) and parts[-1].value is ...
            ):
                return TupleOf(tuple(self.type(part) for part in parts))
            return ListOf(self.type(parts[0]), _LISTS[path])
        if path in _MAPS:
            return MapOf(self.type(parts[-1]))
        if path == _RUNTIME:
            return self.type(parts[0])
        return self.named(path)

    def mark(self, node: ast.expr) -> Mark | None:
        if not isinstance(node, ast.Call):
            return None
        cls = _MARKS.get(resolve(self.module, _name(node.func)))
        if cls is None:
            return None
        given = [ast.literal_eval(argument) for argument in node.args]
        named = {one.arg: ast.literal_eval(one.value) for one in node.keywords if one.arg}
        mark: Mark = cls(*given, **named)
        return mark
