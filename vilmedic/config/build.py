"""Objects out of checked nodes of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vilmedic.config.annotations import ANY, ListOf, MapOf, Marked, TupleOf, Type
from vilmedic.config.check import Checker
from vilmedic.config.marks import KeyPath, Tree, dotted
from vilmedic.config.nodes import Target
from vilmedic.config.signature import read_signature
from vilmedic.config.sources import find_class
from vilmedic.config.types import NameIn
from vilmedic.errors import ConfigError
from vilmedic.registry import Registry, import_class


def build(registry: Registry, node: dict[str, Any], **runtime: Any) -> Any:
    """Make the object that a node describes, the nodes inside it first.

    Args:
        registry: where `proto` is looked up.
        node: `proto` and the arguments; arguments that are missing keep the defaults of the code.
        runtime: what the framework gives: each value reaches every constructor, nested ones
            included, that has a `Runtime` argument of that name.

    Returns:
        The object.

    Raises:
        ConfigError: the node does not fit the signatures, or a constructor refuses a value.
    """
    path: KeyPath = getattr(node, "path", (registry.kind,))
    tree: Tree = getattr(node, "tree", None) or Tree()
    kind = Marked(MapOf(ANY), NameIn(registry.kind))
    checker = Checker(tree)
    checker.value(kind, dict(node), path)
    if checker.problems:
        raise ConfigError(checker.problems)
    return _Builder(tree, runtime).value(kind, dict(node), path)


def build_calls(
    registry: Registry, calls: Any, path: str = "", **runtime: Any
) -> list[tuple[str, Any]]:
    """Make the objects that a mapping or a list of names with options describes.

    Args:
        registry: where the names are looked up.
        calls: `{zero_shot: {prompts: p.yml}, retrieval: }`, or a list of such entries and names.
        path: the dotted key of the mapping, for messages.
        runtime: as for `build`.

    Returns:
        Name and object, in order.
    """
    base = path or registry.kind
    made = []
    for name, options in entries(calls):
        node = _Call({"proto": name, **(options or {})})
        node.path = (*base.split("."), name)
        made.append((name, build(registry, node, **runtime)))
    return made


def check_arguments(cls: type, given: dict[str, Any]) -> None:
    """Refuse arguments that the signature of a class does not allow.

    Args:
        cls: a class of this package that configurations build.
        given: its arguments, as a caller from Python gives them.

    Raises:
        ConfigError: a value is none of those that a configuration may have there.
    """
    read = read_signature(f"{cls.__module__}.{cls.__qualname__}")
    assert read is not None
    checker = Checker(Tree(dict(given)))
    checker.section(read, dict(given), ())
    if checker.problems:
        raise ConfigError(checker.problems)


def entries(calls: Any) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Names with their options, out of a mapping or a list."""
    if isinstance(calls, dict):
        yield from calls.items()
        return
    for entry in calls or ():
        if isinstance(entry, str):
            yield entry, None
        else:
            yield from entry.items()


class _Call(dict[str, Any]):
    path: KeyPath


class _Builder(Checker):
    """Goes through a node that was found faultless and makes objects of it."""

    def __init__(self, tree: Tree, runtime: dict[str, Any]) -> None:
        super().__init__(tree)
        self.runtime = runtime

    def sequence(self, kind: ListOf | TupleOf, values: list[Any]) -> Any:
        container = "tuple" if isinstance(kind, TupleOf) else kind.container
        return {"list": list, "tuple": tuple, "set": set}[container](values)

    def path_value(self, text: str) -> Any:
        return Path(text)

    def default_node(self, kind: Type, path: KeyPath, result: dict[str, Any]) -> None:
        result[str(path[-1])] = self.value(kind, {}, path)

    def finish(self, found: Target, arguments: dict[str, Any], path: KeyPath) -> Any:
        for key in found.consumed:
            arguments.pop(key, None)
        for name, param in found.signature.params.items() if found.signature else ():
            if param.runtime and name in self.runtime:
                arguments[name] = self.runtime[name]
        cls = self.class_of(found, path)
        try:
            return cls(**arguments)
        except (ValueError, TypeError) as error:
            origin = self.tree.origin(path)
            where = f"{dotted(path)} ({origin})" if origin else dotted(path)
            raise ConfigError(f"{where}: {cls.__name__} refuses it: {error}") from error

    def class_of(self, found: Target, path: KeyPath) -> Any:
        if found.registry is not None and found.name is not None:
            return found.registry.get(found.name)
        cls = find_class(found.path)
        if cls is None:
            raise ConfigError(f"{dotted(path)}: there is no class {found.path}.")
        module = cls.module.path
        return import_class(f"{module}:{found.path[len(module) + 1 :]}", f"'{dotted(path)}'")
