"""Configuration layers: files, their includes and the command line, merged in order.

An upper layer may make keys of a lower one meaningless, by a new class or by a section given as a
whole: they are dropped, with a note.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vilmedic.config.check import Checker
from vilmedic.config.namespaces import Target, is_node, signature, target
from vilmedic.config.signature import Signature, derives_from
from vilmedic.config.tree import (
    COMMAND_LINE,
    KeyPath,
    Mark,
    Tree,
    copied,
    dotted,
    guard,
    resolve,
)
from vilmedic.config.types import Marked, OptionsOf, Type, instance_of, options, spell
from vilmedic.config.yaml_source import Override, read_file
from vilmedic.errors import LONGEST_NAME, ConfigError, nearest

MOST_FILES = 32
"""Most files of a configuration; a file that is included twice counts twice."""
MOST_TOGETHER = 20_000
"""Most keys and values of all files together."""


def read_layers(path: str) -> tuple[list[Tree], list[str]]:
    """Return a configuration file and everything it includes, the weakest first.

    Args:
        path: the file.

    Returns:
        The layers, and one line for each file that was not found at the first place.

    Raises:
        ConfigError: a file is missing, not readable, or includes itself.
    """
    notes: list[str] = []
    return _read(path, path, [], "", notes, []), notes


def _read(
    path: str, written: str, chain: list[str], origin: str, notes: list[str], sizes: list[int]
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
        raise ConfigError(f"{where}{_absent(path, written)}")
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
            raise ConfigError(f"includes ({line}): given {given!r}; allowed: list of file names.")
        for index, name in enumerate(names):
            origin = tree.origin(("includes", index))
            found = _included(name, path, origin, notes)
            layers += _read(found, name, [*chain, path], origin, notes, sizes)
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
    # the one whose folder exists is more likely
    likelier = not os.path.isdir(os.path.dirname(beside)) and os.path.isdir(os.path.dirname(here))
    return here if likelier else beside


def _absent(path: str, written: str) -> str:
    """Explain why there is no such file.

    Args:
        path: the file.
        written: the path as it was given; a suggestion can be written in its place.
    """
    if os.path.isdir(path):
        return f"'{path}' is a folder. Allowed: a YAML file."
    file, start = Path(path), os.path.dirname(written)
    beside = [os.path.join(start, one.name) for one in _yaml_files(file.parent, "*")]
    elsewhere: list[str] = []
    if path == written:  # of the command line; what is included is looked for in one place
        elsewhere = [str(one) for one in _yaml_files(Path(), "config*/**/*")]
    same = [one for one in elsewhere if Path(one).name == file.name]
    hint = (
        nearest(path, same)
        or _near_name(file.name, same)
        or _near_name(file.name, beside)
        or nearest(path, elsewhere)
    )
    if not file.parent.is_dir():
        return f"there is no folder '{file.parent}'.{hint}"
    listed = f" Allowed: {', '.join(beside)}." if beside and not hint else ""
    return f"there is no file '{path}'.{listed}{hint}"


def _near_name(name: str, paths: list[str]) -> str:
    """The suggestion of a path by the name of its file alone."""
    by_name = {Path(path).name: path for path in paths}
    close = difflib.get_close_matches(name[:LONGEST_NAME], by_name, n=1)
    return f" Did you mean '{by_name[close[0]]}'?" if close else ""


def _yaml_files(folder: Path, pattern: str) -> list[Path]:
    found = (one for one in folder.glob(pattern) if one.suffix in (".yml", ".yaml"))
    return sorted(one for one in found if not one.name.startswith("."))


def merge(lower: Tree, upper: Tree) -> Tree:
    """Merge two layers: mappings are merged, other values of the upper one replace.

    A mapping that the command line gives whole replaces as well.

    Args:
        lower: the weaker layer.
        upper: the stronger layer.
    """
    weaker = Tree(copied(lower.data), dict(lower.marks))
    removed = {**lower.removed, **upper.removed}
    _make_way(weaker, upper, ())
    data = _together(weaker.data, upper.data)
    result = Tree(data, {**weaker.marks, **upper.marks}, removed)
    for path, mark in upper.marks.items():
        if not isinstance(upper.get(path), dict):
            continue
        if mark.whole:
            result.get(path[:-1])[path[-1]] = copied(upper.get(path))
            result.forget(path)
            inside = (one for one in upper.marks if one[: len(path)] == path)
            result.marks.update({one: upper.marks[one] for one in inside})
        elif mark.origin == COMMAND_LINE and path in weaker.marks:
            # a mapping that the command line adds to keeps its place in the file
            result.marks[path] = weaker.marks[path]
    return result


def _make_way(lower: Tree, upper: Tree, path: KeyPath) -> None:
    """Remove values of the lower layer that the upper one replaces rather than merges into."""
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
    """Merge two mappings, the second over the first."""
    if _looks_up(below, above):
        merged = OmegaConf.merge(OmegaConf.create(below), OmegaConf.create(above))
        return OmegaConf.to_container(merged, resolve=False)
    return _over(below, above)


def _looks_up(below: dict[str, Any], above: dict[str, Any]) -> bool:
    """Return whether a mapping goes over text, which may refer to another mapping."""
    pairs = [(below[key], value) for key, value in above.items() if key in below]
    return any(
        isinstance(value, dict)
        and (isinstance(one, str) or (isinstance(one, dict) and _looks_up(one, value)))
        for one, value in pairs
    )


def _over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copied(above)
    both = {key: _over(below.get(key), value) for key, value in above.items()}
    return {**copied(below), **both}


def apply_overrides(overrides: list[Override], lower: Tree) -> tuple[Tree, list[str]]:
    """Return the layer of a command line over the files.

    A section given whole, `a={b: 1}`, replaces that of the files; a dotted key, `a.b=1`, changes
    it inside.

    Args:
        overrides: the words, in their order.
        lower: the merged files; `~key` removes keys from them.

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
            # the value of an earlier word is removed, and that of the files too
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


def drop_replaced(lower: Tree, upper: Tree, root: Signature, defaults: dict[str, Any]) -> list[str]:
    """Remove keys of a lower layer that an upper one makes meaningless.

    Args:
        lower: the weaker layer; changed in place.
        upper: the stronger layer.
        root: the signature of the whole configuration.
        defaults: the values of keys that are not given, for interpolations.

    Returns:
        One line for each choice that dropped something.
    """
    below, _ = resolve(lower, defaults)
    above, _ = resolve(merge(lower, upper), defaults)
    return _Dropper(lower, upper, below, above).run(root)


class _Dropper:
    def __init__(self, lower: Tree, upper: Tree, below: Tree, above: Tree) -> None:
        self.lower = lower
        self.upper = upper
        self.below = below
        self.above = above
        self.checker = Checker(above)
        self.lines: list[str] = []
        self.origins: dict[KeyPath, str] = {}

    def run(self, root: Signature) -> list[str]:
        for path, mark in list(self.upper.marks.items()):
            if mark.whole:
                self.replaced(path)
        self.arguments(root, ())
        return self.lines

    def replaced(self, path: KeyPath) -> None:
        """Drop keys that a section given as a whole does not repeat."""
        given = self.mapping(self.upper, path)
        below = self.mapping(self.lower, path)
        if given is None or below is None:
            return
        gone = [(*path, key) for key in below if key not in given]
        origins = {one: self.lower.origin(one) for one in gone}
        self.lower.remove(path)
        if gone:
            listed = ", ".join(f"{dotted(one)} ({origins[one]})" for one in gone)
            self.lines.append(
                f"{dotted(path)} is given whole ({self.upper.origin(path)}), which leaves out: "
                f"{listed}. A key inside, such as {dotted(gone[0])}=..., changes nothing else."
            )

    def mapping(self, tree: Tree, path: KeyPath) -> dict[str, Any] | None:
        found = tree.get(path) if tree.has(path) else None
        return found if isinstance(found, dict) else None

    def arguments(self, read: Signature, path: KeyPath) -> None:
        """Check the arguments that both layers give."""
        for name, param in read.settable.items():
            for option in options(param.type):
                if isinstance(option, Marked) and isinstance(option.mark, OptionsOf):
                    self.chosen(option.mark, read, path, name)
            if is_node(param.type):
                self.node(param.type, (*path, name))

    def node(self, kind: Type, path: KeyPath) -> None:
        above = self.mapping(self.above, path)
        below = self.mapping(self.below, path)
        if above is None or below is None or not self.touched(path):
            return
        try:
            found = target(kind, above)
        except ConfigError:
            return
        if found.signature is None:
            return
        if self.upper.has((*path, "proto")) and above.get("proto") != below.get("proto"):
            self.note_dropped((*path, "proto"), self.strip(found, path))
            self.note_kept(found.signature, path)
        self.arguments(found.signature, path)

    def touched(self, path: KeyPath) -> bool:
        """Return whether the upper layer sets or removes anything in a section."""
        removed = any(one[: len(path)] == path for one in self.upper.removed)
        return removed or self.mapping(self.upper, path) is not None

    def strip(self, found: Target, path: KeyPath) -> list[KeyPath]:
        """Drop the keys of a node that its new class does not know; returns their paths."""
        below = self.mapping(self.below, path)
        if found.signature is None or below is None:
            return []
        dropped: list[KeyPath] = []
        extras, open_ended = self.checker.extras(found.signature, self.above.get(path))
        settable = found.signature.settable
        for key in list(below):
            where = (*path, key)
            if key in found.consumed or (open_ended and key not in found.signature.params):
                continue
            if key in settable and is_node(settable[key].type):
                dropped += self.nested(settable[key].type, where)
            elif key not in settable and key not in extras:
                dropped += self.drop(where)
        return dropped

    def nested(self, kind: Type, path: KeyPath) -> list[KeyPath]:
        """Drop the unknown keys of a node inside a node of a new class."""
        below = self.mapping(self.below, path)
        above = self.mapping(self.above, path)
        if below is None or above is None:
            return []
        dropped: list[KeyPath] = []
        instance = instance_of(kind)
        try:
            found = target(kind, above)
            kept = self.upper.has((*path, "proto")) or "proto" not in below or not found.consumed
            if not kept and instance and not derives_from(found.path, instance.path):
                # the old class had its own kind of part here
                dropped += self.drop((*path, "proto"))
                found = target(kind, {key: above[key] for key in above if key != "proto"})
        except ConfigError:
            return dropped
        return dropped + self.strip(found, path)

    def chosen(self, mark: OptionsOf, read: Signature, path: KeyPath, name: str) -> None:
        """Drop the options of a class that is no longer chosen."""
        key = (*path, mark.key)
        where = (*path, name)
        below = self.mapping(self.below, where)
        removed = key in self.upper.removed
        if below is None or not (removed or self.upper.has(key)):
            return
        default = read.params[mark.key].default if mark.key in read.params else None
        old = self.below.get(key) if self.below.has(key) else default
        new = self.above.get(key) if self.above.has(key) else default
        if old == new and not removed:
            return
        known: set[str] = set()
        if new is not None:
            try:
                of = signature(mark.namespace, str(new))
            except ConfigError:
                return
            if of is None or of.extras is not None:
                return
            known = set(of.settable)
        self.note_dropped(
            key,
            [one for option in below if option not in known for one in self.drop((*where, option))],
        )

    def drop(self, path: KeyPath) -> list[KeyPath]:
        if not self.lower.has(path):
            return []
        self.origins[path] = self.lower.origin(path)
        self.lower.remove(path)
        return [path]

    def note_dropped(self, choice: KeyPath, dropped: list[KeyPath]) -> None:
        if dropped:
            listed = ", ".join(f"{dotted(one)} ({self.origins[one]})" for one in dropped)
            chosen = self.above.has(choice)
            now = f"now {spell(self.above.get(choice))}" if chosen else "removed"
            origin = self.upper.origin(choice) if chosen else COMMAND_LINE
            self.lines.append(
                f"{dotted(choice)} is {now} ({origin}), which does not know: {listed}; left out."
            )

    def note_kept(self, read: Signature, path: KeyPath) -> None:
        """Note values that were given for another class and are not the defaults of the new one."""
        kept = [
            f"{dotted((*path, key))}={spell(value)} ({self.lower.origin((*path, key))})"
            for key, value in (self.mapping(self.lower, path) or {}).items()
            if key in read.settable
            and not isinstance(value, dict)
            and not self.upper.has((*path, key))
            and not read.settable[key].required
            and value != read.settable[key].default
        ]
        if kept:
            choice = (*path, "proto")
            self.lines.append(
                f"{dotted(choice)} is now {spell(self.above.get(choice))} "
                f"({self.upper.origin(choice)}), which keeps: {', '.join(kept)}."
            )
