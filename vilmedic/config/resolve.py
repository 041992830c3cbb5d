"""Fills in `${...}` and finds the values that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from vilmedic.config.marks import KeyPath, Mark, Tree, dotted
from vilmedic.errors import ConfigError, nearest, visible

_NAMED = re.compile(r"\$\{(\.*)([\w.]+)\}")


class _Broken:
    """Stands for a value that was reported already."""

    def __repr__(self) -> str:
        return "an unusable value"


BROKEN = _Broken()


LONGEST = 1000
"""Letters of a text that refers to other values."""
MOST_REFERENCES = 20
"""References in one text."""
MOST_REFERRING = 1000
"""Texts of a configuration that refer to other values."""
MOST_NESTED = 8
"""Texts of a configuration with a reference inside a reference."""
MOST_VALUES = 3000
"""Values of a configuration that holds references, those that they stand for included."""
MOST_PROBLEMS = 100
"""Problems that are told at once."""
DEEPEST = 32
"""References that lead to references."""
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


def guard(tree: Tree) -> None:
    """Replace text that is no valid interpolation by a missing value with a note.

    Raises:
        ConfigError: more of it, or longer, than anything but an attack has.
    """
    texts = list(_referring(tree.data, ()))
    nested = [path for path, text in texts if "${" in _REFERENCE.sub("", text)]
    if len(texts) > MOST_REFERRING or len(nested) > MOST_NESTED:
        path = nested[-1] if len(nested) > MOST_NESTED else texts[-1][0]
        raise ConfigError(f"{_where(tree, path)}: too many values refer to others.")
    for path, text in texts:
        if len(text) > LONGEST or text.count("${") > MOST_REFERENCES:
            raise ConfigError(
                f"{_where(tree, path)}: given '{visible(text)}'; allowed: {LONGEST:,} letters "
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
    """The tree with every interpolation replaced by what it stands for.

    Args:
        tree: merged values.
        defaults: what interpolations find where the tree has no value, two levels deep.

    Returns:
        The resolved tree, in which an unusable value is `BROKEN`, and one text a problem.
    """
    if not _has_special(tree.data):
        return Tree(_copy(tree.data), tree.marks, tree.removed), []
    known = _with_defaults(tree.data, defaults)
    _Size(known, tree).check()
    config = OmegaConf.create(known)
    problems: list[str] = []
    opened: list[Any] = []

    def complain(path: KeyPath, text: str) -> Any:
        if len(problems) < MOST_PROBLEMS:
            problems.append(f"{dotted(path)} ({tree.origin(path)}): {text}")
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
            # what is near is looked for as long as it is told
            told = len(problems) < MOST_PROBLEMS
            return complain(path, _unknown(tree, path, error)) if told else BROKEN
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
    """The dotted keys that the interpolations in a value refer to."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return frozenset().union(*(references(one, (*path, key)) for key, one in items))
    found = _NAMED.findall(value) if isinstance(value, str) else []
    # each leading dot of a relative one goes up a level
    return frozenset(dotted((*path[: -len(dots)], name)) if dots else name for dots, name in found)


def _referring(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """The texts that refer to other values, with the places where they stand."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _referring(one, (*path, key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _referring(one, (*path, index))
    elif isinstance(value, str) and "${" in value:
        yield path, value


def _has_special(value: Any) -> bool:
    """Whether there is text that is not what it stands for: a reference, or ??? for missing."""
    if isinstance(value, dict):
        return any(_has_special(one) for one in value.values())
    if isinstance(value, list):
        return any(_has_special(one) for one in value)
    return isinstance(value, str) and ("${" in value or value == "???")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list) else value


def _where(tree: Tree, path: KeyPath) -> str:
    return f"{dotted(path)} ({tree.origin(path)})" if path else "the configuration"


class _Size:
    """How large a tree becomes when every reference is replaced by what it stands for.

    References to references double with each level: a few lines would fill any memory.
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
        """Values in a value; of text its references and a thousandth of its letters."""
        if path in self.known:
            return self.known[path]
        self.known[path] = 0  # what refers to itself is found when it is resolved
        if depth > DEEPEST:
            raise ConfigError(f"{_where(self.tree, path)}: refers to others too many times over.")
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            size = 1 + sum(self.of(one, (*path, key), depth) for key, one in items)
        elif isinstance(value, str) and "${" in value:
            size = 1 + sum(self.behind(name, path, depth) for name in _REFERENCE.findall(value))
        else:
            size = 1 + (len(value) // 1000 if isinstance(value, str) else 0)
        if size > MOST_VALUES:
            raise ConfigError(
                f"{_where(self.tree, path)}: stands for more than {MOST_VALUES:,} values."
            )
        self.known[path] = size
        return size

    def behind(self, name: str, path: KeyPath, depth: int) -> int:
        """The size of what a reference stands for; 1 where that is not known."""
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
