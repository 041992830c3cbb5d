"""Finds keys that have no effect because of what another key says.

Which key depends on which stands beside the key itself, as the marks `UsedWith`, `Overruled` and
`Within` of its annotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vilmedic.config.annotations import AnyOf, Marked, Type
from vilmedic.config.marks import COMMAND_LINE, KeyPath, Tree, dotted
from vilmedic.config.namespaces import signature
from vilmedic.config.resolve import BROKEN
from vilmedic.config.signature import Signature
from vilmedic.config.types import OptionsOf, Overruled, UsedWith, Within
from vilmedic.config.wording import shown, spell
from vilmedic.errors import ConfigError

Dependence = UsedWith | Overruled | Within
UNSET = object()


@dataclass(frozen=True)
class Idle:
    """A key without effect.

    Args:
        path: the key.
        why: the rest of a sentence that begins with the key.
        dropped: whether a stronger layer made it so, and it is to be left out.
    """

    path: KeyPath
    why: str
    dropped: bool


def idle_keys(tree: Tree, read: Signature, given: dict[str, Any], path: KeyPath) -> Iterator[Idle]:
    """The keys of a section that have no effect.

    A key whose value another one refers to, `${trainor.optim_params.lr}`, has one. So that a
    configuration written out in full can be read back, a default stated in a file is no fault,
    nor is a rate that equals the one that overrules it.

    Args:
        tree: the values and their marks.
        read: the signature of the section.
        given: the section.
        path: where it stands.
    """
    section = _Section(tree, read, given, path)
    for name, param in read.settable.items():
        for mark in dependences(param.type) if name in given else ():
            found = section.judge(mark, name)
            if found is not None:
                yield found
                break


def dependences(kind: Type) -> list[Dependence]:
    """The marks of a type that say what its value depends on."""
    if isinstance(kind, AnyOf):
        return [mark for one in kind.options for mark in dependences(one)]
    if not isinstance(kind, Marked):
        return []
    own = [kind.mark] if isinstance(kind.mark, Dependence) else []
    return [*dependences(kind.base), *own]


class _Section:
    def __init__(self, tree: Tree, read: Signature, given: dict[str, Any], path: KeyPath) -> None:
        self.tree = tree
        self.read = read
        self.given = given
        self.path = path

    def judge(self, mark: Dependence, name: str) -> Idle | None:
        if isinstance(mark, Overruled):
            return self.overruled(mark, name)
        value, other = self.given[name], self.value(mark.key)
        if BROKEN in (value, other) or not self.is_idle(mark, value, other):
            return None
        if value in (None, {}, []):
            return None  # asks for nothing
        path, key = (*self.path, name), (*self.path, mark.key)
        typed = self.is_typed(path)
        if not typed and (value == self.read.params[name].default or self.is_mode(mark)):
            return None
        if isinstance(mark, Within):
            limit = f"{dotted(key)} is {spell(other)}{self.source(key)}"
            why = f"is beyond the last one: {limit}, and the first is number 0"
        else:
            is_now = f"is {shown(other)}{self.source(key)}"
            why = f"has no effect unless {dotted(key)} {_condition(mark, other)}, and it {is_now}"
        return self.found(path, key, value, why)

    @staticmethod
    def is_mode(mark: Dependence) -> bool:
        return isinstance(mark, UsedWith) and mark.mode

    @staticmethod
    def is_idle(mark: UsedWith | Within, value: Any, other: Any) -> bool:
        if isinstance(mark, Within):
            numbers = all(isinstance(one, int) for one in (value, other))
            return numbers and value > 0 and value >= other
        return other not in mark.values if mark.values else not other

    def overruled(self, mark: Overruled, name: str) -> Idle | None:
        options, other = self.given[name], self.value(mark.by)
        if not isinstance(options, dict) or mark.option not in options:
            return None
        value = options[mark.option]
        if not other or BROKEN in (value, other) or value == other:
            return None
        path = (*self.path, name, mark.option)
        key = (*self.path, *mark.by.split("."))
        stated = self.source(key) if self.tree.has(key) else ", as it is by default"
        instead = mark.instead.format(section=dotted(self.path))
        why = f"has no effect, as {dotted(key)} is {shown(other)}{stated}: {instead}"
        if self.tree.layer(key) is None:
            key = self.chooser(mark.by.partition(".")[0]) or key
        return self.found(path, key, value, why)

    def chooser(self, name: str) -> KeyPath | None:
        """The key that names the class whose options a mapping holds."""
        param = self.read.params.get(name)
        for mark in [] if param is None else _options_marks(param.type):
            return (*self.path, mark.key)
        return None

    def found(self, path: KeyPath, key: KeyPath, value: Any, why: str) -> Idle | None:
        name = dotted(path)
        if any(name == one or name.startswith(f"{one}.") for one in self.tree.referred):
            return None
        own, others = self.tree.layer(path), self.tree.layer(key)
        if own is not None and others is not None and own < others:
            return Idle(path, why, dropped=True)
        return Idle(path, f"given {shown(value)}, which {why}.", dropped=False)

    def value(self, key: str) -> Any:
        """The value of a sibling key, or of an option of the class that a sibling key names."""
        first, _, option = key.partition(".")
        param = self.read.params.get(first)
        value = self.given.get(first, param.default if param is not None else None)
        if not option or value is BROKEN:
            return value
        if isinstance(value, dict) and option in value:
            return value[option]
        marks = [] if param is None else _options_marks(param.type)
        for mark in marks:
            chosen = self.value(mark.key)
            try:
                of = signature(mark.namespace, chosen) if isinstance(chosen, str) else None
            except ConfigError:
                continue
            if of is not None and option in of.params:
                return of.params[option].default
        return None

    def is_typed(self, path: KeyPath) -> bool:
        """Whether the value of a key, or something in it, comes from the command line."""
        return any(
            mark.origin == COMMAND_LINE
            for one, mark in self.tree.marks.items()
            if one[: len(path)] == path
        )

    def source(self, key: KeyPath) -> str:
        found = self.tree.marks.get(key)
        return f" ({found.origin})" if found is not None else ""


def _options_marks(kind: Type) -> list[OptionsOf]:
    if not isinstance(kind, Marked):
        return []
    own = [kind.mark] if isinstance(kind.mark, OptionsOf) else []
    return [*_options_marks(kind.base), *own]


def _condition(mark: UsedWith, other: Any) -> str:
    if mark.values:
        return "is " + " or ".join(spell(value) for value in mark.values)
    return "is true" if isinstance(other, bool) else "is set"
