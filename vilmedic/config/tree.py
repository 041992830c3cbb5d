"""Configuration values with their sources, and `${...}` references between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from vilmedic.errors import ConfigError, nearest, visible

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"
LONGEST = 1000
"""Most characters of a text with references."""
MOST_REFERENCES = 20
"""Most references in one text."""
MOST_REFERRING = 1000
"""Most texts of a configuration with references."""
MOST_NESTED = 8
"""Most texts of a configuration with nested references."""
MOST_VALUES = 3000
"""Most values of a configuration after references are replaced."""
MOST_PROBLEMS = 100
"""Most problems that are reported together."""
DEEPEST = 32
"""Deepest chain of references."""
_NAMED = re.compile(r"\$\{(\.*)([\w.]+)\}")
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


class _Broken:
    """Marks a value whose problem has already been reported."""

    def __repr__(self) -> str:
        return "an unusable value"


BROKEN = _Broken()


@dataclass(frozen=True)
class Mark:
    """The source of one value.

    Args:
        origin: `file:line` or `command line`.
        raw: the text as typed, if parsing it as a number, a boolean or null loses it.
        note: what is wrong with the text, for the error message if the value cannot be used.
        layer: number of the layer that gives it, the weakest 0; the command line is the last one.
        whole: whether it is a mapping that replaces that of lower layers instead of adding to it.
    """

    origin: str
    raw: str | None = None
    note: str = ""
    layer: int = 0
    whole: bool = False


@dataclass
class Tree:
    """Plain nested values with a mark for each of them.

    Args:
        data: mappings with text keys, lists, text, numbers, booleans and None.
        marks: the source of every value, by its path.
        removed: the keys that the command line removed.
        referred: the dotted keys that other values refer to, `${trainor.batch_size}`.
    """

    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    removed: dict[KeyPath, Mark] = field(default_factory=dict)
    referred: frozenset[str] = frozenset()

    def origin(self, path: KeyPath) -> str:
        """Return the source of a value, or of the nearest enclosing one with a source."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]].origin
        return ""

    def where(self, path: KeyPath) -> str:
        """Return a key for messages: dotted, with the source of its value if there is one."""
        origin = self.origin(path)
        name = dotted(path) or "the configuration"
        return f"{name} ({origin})" if origin else name

    def mark(self, path: KeyPath) -> Mark:
        """The mark of a value itself; an empty one when it has none."""
        return self.marks.get(path, Mark(self.origin(path)))

    def layer(self, path: KeyPath) -> int | None:
        """Return the layer that set or removed a value; None for a default."""
        for known in (self.marks, self.removed):
            if path in known:
                return known[path].layer
        for length in range(len(path) - 1, 0, -1):
            mark = self.marks.get(path[:length])
            if mark is not None and mark.whole:
                return mark.layer
        return None

    def has(self, path: KeyPath) -> bool:
        """Return whether there is a value at a path, null included."""
        node: Any = self.data
        for part in path:
            if isinstance(node, list):
                known = isinstance(part, int) and part < len(node)
            else:
                known = isinstance(node, dict) and part in node
            if not known:
                return False
            node = node[part]
        return True

    def get(self, path: KeyPath) -> Any:
        """The value at a path that exists."""
        node: Any = self.data
        for part in path:
            node = node[part]
        return node

    def remove(self, path: KeyPath) -> None:
        """Remove an existing value, with the marks of everything in it."""
        value = self.get(path)
        del self.get(path[:-1])[path[-1]]
        for inside in _places(value, path):
            self.marks.pop(inside, None)

    def forget(self, path: KeyPath) -> None:
        """Remove the marks of a value and of everything in it."""
        for known in [known for known in self.marks if known[: len(path)] == path]:
            del self.marks[known]

    def stamp(self, layer: int) -> None:
        """Set the layer of all values."""
        self.marks = {path: replace(mark, layer=layer) for path, mark in self.marks.items()}


def _places(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The path of a value and of everything in it."""
    yield path
    items: Any = enumerate(value) if isinstance(value, list) else ()
    for key, one in value.items() if isinstance(value, dict) else items:
        yield from _places(one, (*path, key))


def dotted(path: KeyPath) -> str:
    """Return a path as users write it: `ensemblor.splits.0`."""
    return ".".join(str(part) for part in path)


def copied(value: Any) -> Any:
    """Copy the mappings and lists of a value; leaf values are never changed in place."""
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return [copied(one) for one in value] if isinstance(value, list) else value


def guard(tree: Tree) -> None:
    """Replace invalid interpolations by a missing value with a note.

    Raises:
        ConfigError: there are more or longer ones than any real configuration has.
    """
    texts = list(_referring(tree.data, ()))
    nested = [path for path, text in texts if "${" in _REFERENCE.sub("", text)]
    if len(texts) > MOST_REFERRING or len(nested) > MOST_NESTED:
        path = nested[-1] if len(nested) > MOST_NESTED else texts[-1][0]
        raise ConfigError(f"{tree.where(path)}: too many values refer to others.")
    for path, text in texts:
        if len(text) > LONGEST or text.count("${") > MOST_REFERENCES:
            raise ConfigError(
                f"{tree.where(path)}: given '{visible(text)}'; allowed: {LONGEST:,} letters "
                f"with {MOST_REFERENCES} references."
            )

    def visit(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: visit(one, (*path, key)) for key, one in value.items()}
        if isinstance(value, list):
            return [visit(one, (*path, index)) for index, one in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            try:
                OmegaConf.create({"value": value})
            except (GrammarParseError, RecursionError):
                tree.marks[path] = Mark(
                    tree.origin(path), note=f"given '{value}', which is no valid interpolation."
                )
                return "???"
        return value

    tree.data = visit(tree.data, ())


def resolve(tree: Tree, defaults: dict[str, Any]) -> tuple[Tree, list[str]]:
    """Return the tree with every interpolation replaced by its value.

    Args:
        tree: merged values.
        defaults: values for interpolations of keys that are not set, two levels deep.

    Returns:
        The resolved tree, in which an unusable value is `BROKEN`, and one text per problem.
    """
    if not _has_special(tree.data):
        return Tree(copied(tree.data), tree.marks, tree.removed), []
    known = _with_defaults(tree.data, defaults)
    _Size(known, tree).check()
    config = OmegaConf.create(known)
    problems: list[str] = []
    opened: list[Any] = []

    def complain(path: KeyPath, text: str) -> Any:
        if len(problems) < MOST_PROBLEMS:
            problems.append(f"{tree.where(path)}: {text}")
        return BROKEN

    def visit(container: Any, path: KeyPath) -> Any:
        if isinstance(container, DictConfig):
            given = tree.get(path) if tree.has(path) else None
            keys = given if isinstance(given, dict) else container
            return {str(key): item(container, key, (*path, str(key))) for key in keys}
        return [item(container, index, (*path, index)) for index in range(len(container))]

    def item(container: Any, key: Any, path: KeyPath) -> Any:
        try:
            value = container[key]
        except MissingMandatoryValue:
            return complain(path, tree.mark(path).note or "has to be given a value (it is ???).")
        except InterpolationKeyError as error:
            # suggestions are only searched for problems that are reported
            reported = len(problems) < MOST_PROBLEMS
            return complain(path, _unknown(tree, path, error)) if reported else BROKEN
        except (OmegaConfBaseException, RecursionError) as error:
            text = str(error).partition("\n")[0]
            return complain(path, f"cannot be resolved: {text}.")
        if isinstance(value, DictConfig | ListConfig):
            if any(value is one for one in opened):
                return complain(path, f"given '{_given(tree, path)}', which contains itself.")
            opened.append(value)
            result = visit(value, path)
            opened.pop()
            return result
        return value

    values = visit(config, ())
    return Tree(values, tree.marks, tree.removed, references(tree.data)), problems


def references(value: Any, path: KeyPath = ()) -> frozenset[str]:
    """Return the dotted keys that the interpolations in a value refer to."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return frozenset().union(*(references(one, (*path, key)) for key, one in items))
    found = _NAMED.findall(value) if isinstance(value, str) else []
    # each leading dot of a relative reference goes up one level
    return frozenset(dotted((*path[: -len(dots)], name)) if dots else name for dots, name in found)


def _referring(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Return the texts with references, with their paths."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _referring(one, (*path, key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _referring(one, (*path, index))
    elif isinstance(value, str) and "${" in value:
        yield path, value


def _has_special(value: Any) -> bool:
    """Return whether a value holds a reference, or ??? for a missing value."""
    if isinstance(value, dict):
        return any(_has_special(one) for one in value.values())
    if isinstance(value, list):
        return any(_has_special(one) for one in value)
    return isinstance(value, str) and ("${" in value or value == "???")


class _Size:
    """Size of a tree after every reference is replaced by its value.

    References to references double with each level: a few lines could exhaust the memory.
    """

    def __init__(self, data: Any, tree: Tree) -> None:
        self.data = data
        self.tree = tree
        self.known: dict[KeyPath, int] = {}

    def check(self) -> None:
        """Refuse a tree that becomes too large.

        Raises:
            ConfigError: it does.
        """
        if self.of(self.data, (), 0) > MOST_VALUES:
            raise ConfigError("the values that refer to others stand for too many values.")

    def of(self, value: Any, path: KeyPath, depth: int) -> int:
        """Count the values in a value; text counts its references and 1/1000 of its characters."""
        if path in self.known:
            return self.known[path]
        self.known[path] = 0  # cycles are found when references are resolved
        if depth > DEEPEST:
            raise ConfigError(f"{self.tree.where(path)}: refers to others too many times over.")
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            size = 1 + sum(self.of(one, (*path, key), depth) for key, one in items)
        elif isinstance(value, str) and "${" in value:
            size = 1 + sum(self.behind(name, path, depth) for name in _REFERENCE.findall(value))
        else:
            size = 1 + (len(value) // 1000 if isinstance(value, str) else 0)
        if size > MOST_VALUES:
            raise ConfigError(
                f"{self.tree.where(path)}: stands for more than {MOST_VALUES:,} values."
            )
        self.known[path] = size
        return size

    def behind(self, name: str, path: KeyPath, depth: int) -> int:
        """Return the size of a reference's value; 1 if unknown."""
        dots = len(name) - len(name.lstrip("."))
        parts = [one for one in re.split(r"[.\[\]]+", name.strip().strip(".")) if one]
        base = path[: len(path) - dots] if dots else ()
        value, where = self.data, base
        try:
            for part in base:
                value = value[part]
            for part in parts:
                key = int(part) if isinstance(value, list) else part
                value, where = value[key], (*where, key)
        except (KeyError, IndexError, ValueError, TypeError):
            return 1
        return self.of(value, where, depth + 1)


def _with_defaults(data: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **data}
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            filled[key] = {**value, **data[key]}
    return filled


def _given(tree: Tree, path: KeyPath) -> Any:
    return tree.get(path) if tree.has(path) else "..."


def _unknown(tree: Tree, path: KeyPath, error: InterpolationKeyError) -> str:
    text = str(error).partition("\n")[0]
    name = text.split("'")[1] if text.count("'") >= 2 else ""
    known = {dotted(one) for one in tree.marks}
    return f"given '{_given(tree, path)}'; {text[:1].lower()}{text[1:]}.{nearest(name, known)}"
