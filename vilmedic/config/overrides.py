"""The command line as the last layer of a configuration: `key=value` and `~key`."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

from vilmedic.config.marks import COMMAND_LINE, KeyPath, Mark, Tree, dotted
from vilmedic.config.yaml_source import DEEPEST, check_characters, read_yaml
from vilmedic.errors import ConfigError, nearest, visible

_NULL = ("", "~", "null", "Null", "NULL")
_SYNTAX = "Allowed: key=value, with dots between nested keys, or ~key to remove one."


@dataclass(frozen=True)
class Override:
    """One word of the command line.

    Args:
        path: the keys that lead to the value; digits may be the index of a list entry.
        value: the value; None for a removal.
        marks: the marks of the value, by path in it.
        removes: whether the word is `~key`.
    """

    path: tuple[str, ...]
    value: Any
    marks: dict[KeyPath, Mark]
    removes: bool = False


def parse_override(word: str) -> Override:
    """Read one word.

    Args:
        word: `trainor.batch_size=32`, `ensemblor.splits=[validate,test]`, `~trainor.lr_decay`.

    Raises:
        ConfigError: it is neither form.
    """
    check_characters(word, lambda line: COMMAND_LINE)
    removes = word.startswith("~")
    key, equals, text = word.removeprefix("~").partition("=")
    if removes == bool(equals):
        problem = "takes no value" if removes else "has no '='"
        raise ConfigError(f"'{word}' ({COMMAND_LINE}): {problem}. {_SYNTAX}")
    path = tuple(key.split("."))
    if len(path) > DEEPEST:
        raise ConfigError(f"'{visible(word)}' ({COMMAND_LINE}): more than {DEEPEST} nested keys.")
    if any(not part or part != part.strip() or part.startswith(("+", "-")) for part in path):
        raise ConfigError(f"'{word}' ({COMMAND_LINE}): '{key}' is not a key. {_SYNTAX}")
    if path[0] == "includes":
        raise ConfigError(f"includes ({COMMAND_LINE}): is only allowed in a file.")
    if removes:
        return Override(path, None, {}, removes=True)
    value, marks = _parse_value(text.strip())
    return Override(path, value, marks)


def _parse_value(text: str) -> tuple[Any, dict[KeyPath, Mark]]:
    """The value of a word, with the text itself kept for keys that hold text."""
    try:
        value, marks = read_yaml(text, lambda line: COMMAND_LINE)
    except ConfigError as error:
        note = str(error).removeprefix(COMMAND_LINE).lstrip(":0123456789 ")
        return text, {(): Mark(COMMAND_LINE, note=note)}
    if value is None and text not in _NULL:
        # nothing but a comment or an anchor to YAML
        value = text
    raw = None if value is None else text
    if isinstance(value, list) and not text.startswith("["):
        # "- No effusion." is a list to YAML; a list is written [a, b] here
        value, marks = text, {}
    if isinstance(value, str):
        raw = None
        if text[:1] not in ("'", '"'):
            # what follows a # belongs to the value here
            value = text
    marks[()] = replace(marks.get((), Mark(COMMAND_LINE)), raw=raw)
    return value, marks


def apply_overrides(overrides: list[Override], lower: Tree) -> tuple[Tree, list[str]]:
    """The layer that a command line makes over the files.

    A section given whole, `a={b: 1}`, replaces that of the files; a dotted key, `a.b=1`, changes
    it inside.

    Args:
        overrides: the words, in their order.
        lower: the merged files; what `~key` names is taken out of it.

    Returns:
        The layer, and one text a problem.
    """
    layer = Tree()
    problems: list[str] = []
    for override in overrides:
        try:
            if override.removes:
                _remove(override, layer, lower)
            else:
                _set(override, layer, lower)
        except ConfigError as error:
            problems += error.problems
    return layer, problems


def _remove(override: Override, layer: Tree, lower: Tree) -> None:
    found = False
    for tree in (layer, lower):
        path = _indexed(override.path, tree)
        if tree.has(path):
            tree.remove(path)
            found = True
    layer.removed[override.path] = Mark(COMMAND_LINE)
    if not found:
        key = dotted(override.path)
        known = {dotted(path) for tree in (layer, lower) for path in tree.marks}
        raise ConfigError(
            f"~{key} ({COMMAND_LINE}): there is no such key to remove.{nearest(key, known)}"
        )


def _set(override: Override, layer: Tree, lower: Tree) -> None:
    path = _indexed(override.path, layer if layer.has(override.path[:1]) else lower)
    node: Any = layer.data
    for depth, part in enumerate(path[:-1], start=1):
        here = path[:depth]
        following = path[depth]
        inside = node[part] if _holds(node, part) else None
        if isinstance(following, int) and not isinstance(inside, list):
            # one entry changes: the rest of the list is that of the lower layer
            inside = copy.deepcopy(lower.get(here))
            layer.marks.update(
                {known: mark for known, mark in lower.marks.items() if known[:depth] == here}
            )
        elif not isinstance(inside, dict | list):
            # what an earlier word put here is gone, and with it what the files have
            whole = _holds(node, part)
            inside = {}
            layer.forget(here)
            layer.marks[here] = Mark(COMMAND_LINE, whole=whole)
        layer.marks.setdefault(here, Mark(COMMAND_LINE))
        node[part] = inside
        node = inside
    layer.forget(path)
    node[path[-1]] = override.value
    layer.marks.update({(*path, *inner): mark for inner, mark in override.marks.items()})
    if isinstance(override.value, dict):
        layer.marks[path] = replace(layer.marks[path], whole=True)


def _holds(node: Any, part: str | int) -> bool:
    return part in node if isinstance(node, dict) else True


def _indexed(path: tuple[str, ...], tree: Tree) -> KeyPath:
    """The path with the indices of existing lists as numbers.

    Raises:
        ConfigError: an index that the list does not have.
    """
    result: KeyPath = ()
    node: Any = tree.data
    for part in path:
        if isinstance(node, list):
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
                allowed = f"0 to {len(node) - 1}" if node else "none, it is empty"
                raise ConfigError(
                    f"{dotted(path)} ({COMMAND_LINE}): '{part}' is no index of the list "
                    f"'{dotted(result)}'. Allowed: {allowed}."
                )
            result = (*result, int(part))
            node = node[int(part)]
        else:
            result = (*result, part)
            node = node.get(part) if isinstance(node, dict) else None
    return result
