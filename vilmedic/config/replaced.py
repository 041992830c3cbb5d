"""Drops the keys of lower layers that an upper one replaces: new classes, sections given whole."""

from __future__ import annotations

from typing import Any

from vilmedic.config import types
from vilmedic.config.annotations import Marked, Type, instance_of, options
from vilmedic.config.check import Checker
from vilmedic.config.layers import merge
from vilmedic.config.marks import COMMAND_LINE, KeyPath, Tree, dotted
from vilmedic.config.namespaces import signature
from vilmedic.config.nodes import Target, is_node, target
from vilmedic.config.resolve import resolve
from vilmedic.config.signature import Signature, derives_from
from vilmedic.config.wording import spell
from vilmedic.errors import ConfigError


def drop_replaced(lower: Tree, upper: Tree, root: Signature, defaults: dict[str, Any]) -> list[str]:
    """Take out of a lower layer what an upper one makes meaningless.

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

    def run(self, root: Signature) -> list[str]:
        for path, mark in list(self.upper.marks.items()):
            if mark.whole:
                self.replaced(path)
        self.arguments(root, ())
        return self.lines

    def replaced(self, path: KeyPath) -> None:
        """Drop what a section given whole does not name again."""
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
        """Look through the arguments that both layers give."""
        for name, param in read.settable.items():
            for option in options(param.type):
                if isinstance(option, Marked) and isinstance(option.mark, types.OptionsOf):
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
            self.tell((*path, "proto"), self.strip(found, path))
        self.arguments(found.signature, path)

    def touched(self, path: KeyPath) -> bool:
        """Whether the upper layer says anything of a section, or takes something out of it."""
        removed = any(one[: len(path)] == path for one in self.upper.removed)
        return removed or self.mapping(self.upper, path) is not None

    def strip(self, found: Target, path: KeyPath) -> list[KeyPath]:
        """Drop from a node what its new class does not know; the paths dropped."""
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
        """Drop from a node inside a node of a new class what it does not know."""
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

    def chosen(self, mark: types.OptionsOf, read: Signature, path: KeyPath, name: str) -> None:
        """Drop the options of a class that is not the named one any more."""
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
        self.tell(
            key,
            [one for option in below if option not in known for one in self.drop((*where, option))],
        )

    def drop(self, path: KeyPath) -> list[KeyPath]:
        if not self.lower.has(path):
            return []
        self.origins = getattr(self, "origins", {})
        self.origins[path] = self.lower.origin(path)
        self.lower.remove(path)
        return [path]

    def tell(self, choice: KeyPath, dropped: list[KeyPath]) -> None:
        if dropped:
            listed = ", ".join(f"{dotted(one)} ({self.origins[one]})" for one in dropped)
            chosen = self.above.has(choice)
            now = f"now {spell(self.above.get(choice))}" if chosen else "removed"
            origin = self.upper.origin(choice) if chosen else COMMAND_LINE
            self.lines.append(
                f"{dotted(choice)} is {now} ({origin}), which does not know: {listed}; left out."
            )
