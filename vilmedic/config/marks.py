"""Where every value of a configuration comes from, and how it was spelt there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Mark:
    """The source of one value.

    Args:
        origin: `file:line` or `command line`.
        raw: the text as typed, where reading it as a number, a truth value or null loses it.
        note: what is wrong with the text; told when the value turns out to be unusable.
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
        data: mappings with text keys, lists, text, numbers, truth values and None.
        marks: the source of every value, by its path.
        removed: the keys that the command line took out.
        referred: the dotted keys that other values refer to, `${trainor.batch_size}`.
    """

    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    removed: dict[KeyPath, Mark] = field(default_factory=dict)
    referred: frozenset[str] = frozenset()

    def origin(self, path: KeyPath) -> str:
        """The source of a value, or of the nearest enclosing one that has a source."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]].origin
        return ""

    def mark(self, path: KeyPath) -> Mark:
        """The mark of a value itself; an empty one when it has none."""
        return self.marks.get(path, Mark(self.origin(path)))

    def layer(self, path: KeyPath) -> int | None:
        """Number of the layer that decided on a value or on its absence; None for a default."""
        for known in (self.marks, self.removed):
            if path in known:
                return known[path].layer
        for length in range(len(path) - 1, 0, -1):
            mark = self.marks.get(path[:length])
            if mark is not None and mark.whole:
                return mark.layer
        return None

    def has(self, path: KeyPath) -> bool:
        """Whether there is a value at a path, null included."""
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
        """Take out a value that exists, and the marks of everything in it."""
        value = self.get(path)
        del self.get(path[:-1])[path[-1]]
        for inside in _places(value, path):
            self.marks.pop(inside, None)

    def forget(self, path: KeyPath) -> None:
        """Take out the marks of a value and of everything in it."""
        for known in [known for known in self.marks if known[: len(path)] == path]:
            del self.marks[known]

    def stamp(self, layer: int) -> None:
        """Note the number of the layer that all values are of."""
        self.marks = {path: replace(mark, layer=layer) for path, mark in self.marks.items()}


def _places(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The path of a value and of everything in it."""
    yield path
    items: Any = enumerate(value) if isinstance(value, list) else ()
    for key, one in value.items() if isinstance(value, dict) else items:
        yield from _places(one, (*path, key))


def dotted(path: KeyPath) -> str:
    """A path as users write it: `ensemblor.splits.0`."""
    return ".".join(str(part) for part in path)
