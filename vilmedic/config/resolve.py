"""Fills in `${...}` and finds the values that cannot be used."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from vilmedic.config.marks import KeyPath, Mark, Tree, dotted
from vilmedic.errors import nearest

_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")


class _Broken:
    """Stands for a value that was reported already."""

    def __repr__(self) -> str:
        return "an unusable value"


BROKEN = _Broken()


def guard(tree: Tree) -> None:
    """Replace text that is no valid interpolation by a missing value with a note."""

    def visit(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: visit(one, (*path, key)) for key, one in value.items()}
        if isinstance(value, list):
            return [visit(one, (*path, index)) for index, one in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            try:
                OmegaConf.create({"value": value})
            except GrammarParseError:
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
    config = OmegaConf.create(_with_defaults(tree.data, defaults))
    problems: list[str] = []
    opened: list[Any] = []

    def complain(path: KeyPath, text: str) -> Any:
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
            return complain(path, _unknown(tree, path, error))
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
    found = _REFERENCE.findall(value) if isinstance(value, str) else []
    # each leading dot of a relative one goes up a level
    return frozenset(dotted((*path[: -len(dots)], name)) if dots else name for dots, name in found)


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
