"""Configuration files with what they include, and how one layer goes over another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vilmedic.config.marks import COMMAND_LINE, KeyPath, Tree
from vilmedic.config.resolve import guard
from vilmedic.config.yaml_source import read_file
from vilmedic.errors import ConfigError, nearest

MOST_FILES = 32
"""Files that a configuration may be made of, a file that is included twice counted twice."""
MOST_TOGETHER = 20_000
"""Keys and values of files that include each other."""


def read_layers(path: str) -> tuple[list[Tree], list[str]]:
    """A configuration file and everything that it includes, the weakest first.

    Args:
        path: the file.

    Returns:
        The layers, and one line for each file that was not found where it was looked for first.

    Raises:
        ConfigError: a file is missing, not readable, or includes itself.
    """
    notes: list[str] = []
    return _read(path, [], "", notes, []), notes


def _read(
    path: str, chain: list[str], origin: str, notes: list[str], sizes: list[int]
) -> list[Tree]:
    where = f"includes ({origin}): " if origin else ""
    if len(sizes) >= MOST_FILES:
        raise ConfigError(f"{where}more than {MOST_FILES} files are included.")
    if "\0" in path:
        raise ConfigError(f"{where}no file can have the name {path!r}.")
    real = os.path.realpath(path)
    if real in [os.path.realpath(one) for one in chain]:
        raise ConfigError(f"{where}the files include each other: {' -> '.join([*chain, path])}.")
    if not os.path.isfile(path):
        raise ConfigError(f"{where}{_absent(path)}")
    tree = read_file(path)
    sizes.append(len(tree.marks))
    if len(sizes) > 1 and sum(sizes) > MOST_TOGETHER:
        raise ConfigError(f"{where}the files hold more than {MOST_TOGETHER:,} values together.")
    guard(tree)
    layers: list[Tree] = []
    if "includes" in tree.data:
        given = tree.get(("includes",))
        line = tree.origin(("includes",))
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"includes ({line}): given {given!r}; allowed: a list of file names.")
        for index, name in enumerate(names):
            origin = tree.origin(("includes", index))
            found = _included(name, path, origin, notes)
            layers += _read(found, [*chain, path], origin, notes, sizes)
        tree.remove(("includes",))
    return [*layers, tree]


def _included(name: str, path: str, origin: str, notes: list[str]) -> str:
    """The file that another one includes: beside it, or else from the working directory."""
    name = os.path.expanduser(name)
    beside = os.path.normpath(os.path.join(os.path.dirname(path), name))
    here = os.path.normpath(name)
    if os.path.exists(beside) or beside == here:
        return beside
    if os.path.isfile(here):
        notes.append(
            f"includes ({origin}): '{name}' is not beside the file; it is taken from the working "
            "directory."
        )
        return here
    # the one whose folder is there is likelier meant
    likelier = not os.path.isdir(os.path.dirname(beside)) and os.path.isdir(os.path.dirname(here))
    return here if likelier else beside


def _absent(path: str) -> str:
    if os.path.isdir(path):
        return f"'{path}' is a folder. Allowed: a YAML file."
    folder = Path(path).parent
    if not folder.is_dir():
        parents = Path(*folder.parts[:-1])
        beside = [one.name for one in parents.iterdir()] if parents.is_dir() else []
        return f"there is no folder '{folder}'.{nearest(folder.name, beside)}"
    files = sorted(one.name for one in folder.iterdir() if one.suffix in (".yml", ".yaml"))
    hint = nearest(Path(path).name, files)
    listed = f" Allowed: {', '.join(files)}." if files and not hint else ""
    return f"there is no file '{path}'.{listed}{hint}"


def merge(lower: Tree, upper: Tree) -> Tree:
    """Two layers as one: mappings are merged, everything else of the upper one replaces.

    A mapping that the command line gives whole replaces as well.

    Args:
        lower: the weaker layer.
        upper: the stronger layer.
    """
    weaker = Tree(_copy(lower.data), dict(lower.marks))
    removed = {**lower.removed, **upper.removed}
    _make_way(weaker, upper, ())
    data = _together(weaker.data, upper.data)
    result = Tree(data, {**weaker.marks, **upper.marks}, removed)
    for path, mark in upper.marks.items():
        if not isinstance(upper.get(path), dict):
            continue
        if mark.whole:
            result.get(path[:-1])[path[-1]] = _copy(upper.get(path))
            result.forget(path)
            inside = (one for one in upper.marks if one[: len(path)] == path)
            result.marks.update({one: upper.marks[one] for one in inside})
        elif mark.origin == COMMAND_LINE and path in weaker.marks:
            # a mapping that the command line adds to still stands where the file has it
            result.marks[path] = weaker.marks[path]
    return result


def _make_way(lower: Tree, upper: Tree, path: KeyPath) -> None:
    """Take out of the lower layer what the upper one replaces rather than merges into."""
    for key, value in upper.get(path).items():
        where = (*path, key)
        if not lower.has(where):
            continue
        below = lower.get(where)
        if isinstance(value, dict) and isinstance(below, dict):
            _make_way(lower, upper, where)
        elif isinstance(value, dict) and isinstance(below, str):
            # an interpolation may stand for a mapping, which the merge then looks up
            lower.marks.pop(where, None)
        else:
            lower.remove(where)


def _together(below: dict[str, Any], above: dict[str, Any]) -> Any:
    """Two mappings as one, the second over the first."""
    if _looks_up(below, above):
        merged = OmegaConf.merge(OmegaConf.create(below), OmegaConf.create(above))
        return OmegaConf.to_container(merged, resolve=False)
    return _over(below, above)


def _looks_up(below: dict[str, Any], above: dict[str, Any]) -> bool:
    """Whether a mapping goes over text, which may refer to another mapping."""
    pairs = [(below[key], value) for key, value in above.items() if key in below]
    return any(
        isinstance(value, dict)
        and (isinstance(one, str) or (isinstance(one, dict) and _looks_up(one, value)))
        for one, value in pairs
    )


def _over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return _copy(above)
    both = {key: _over(below.get(key), value) for key, value in above.items()}
    return {**_copy(below), **both}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list) else value
