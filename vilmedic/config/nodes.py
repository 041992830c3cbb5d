"""Which class a node of a configuration becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vilmedic.config.annotations import Instance, MapOf, Marked, Type, instance_of, options
from vilmedic.config.marks import KeyPath, dotted
from vilmedic.config.namespaces import kind_of
from vilmedic.config.signature import Signature, read_signature
from vilmedic.config.types import NameIn
from vilmedic.errors import ConfigError
from vilmedic.registry import REGISTRIES, Registry


@dataclass(frozen=True)
class Target:
    """The class behind a node.

    Args:
        signature: its arguments; None when its source text does not show them.
        path: dotted path of the class.
        registry: where `proto` is looked up; None when the node has no such key.
        name: the name that was looked up; None when the class is that of the argument.
    """

    signature: Signature | None
    path: str
    registry: Registry | None = None
    name: str | None = None

    @property
    def consumed(self) -> set[str]:
        """The keys of the node that choose the class and are not its arguments."""
        return set() if self.registry is None else {"proto"}


def registry_of(kind: Type) -> Registry | None:
    """The registry that the `proto` of a node of a type always names; None for other types."""
    for option in options(kind):
        if (
            isinstance(option, Marked)
            and isinstance(option.mark, NameIn)
            and option.mark.namespace in REGISTRIES
            and isinstance(option.base, MapOf)
        ):
            return REGISTRIES[option.mark.namespace]
    return None


def is_node(kind: Type) -> bool:
    """Whether a mapping of a type is built into an object."""
    return registry_of(kind) is not None or instance_of(kind) is not None


def target(kind: Type, node: dict[str, Any]) -> Target:
    """The class that a node becomes.

    Args:
        kind: what the signature says of the node.
        node: its keys and values.

    Raises:
        ConfigError: `proto` is missing where it is needed, or names nothing.
    """
    registry = registry_of(kind)
    if registry is not None:
        return named_target(registry, node)
    instance = instance_of(kind)
    if instance is None:
        raise ValueError(f"{kind} is not the type of a node")
    return instance_target(instance, node)


def named_target(registry: Registry, node: dict[str, Any]) -> Target:
    """The class that the `proto` of a node names in a registry."""
    proto = node.get("proto")
    if proto is None:
        allowed = ", ".join(registry.names()) or "none"
        raise ConfigError(
            f"missing: the name of a {registry.kind} is needed here. Allowed: {allowed}."
        )
    if not isinstance(proto, str):
        allowed = ", ".join(registry.names()) or "none"
        raise ConfigError(f"given {proto!r}, which is not a name. Allowed: {allowed}.")
    location = registry.location(proto)
    return Target(read_signature(location), location.replace(":", "."), registry, proto)


def instance_target(instance: Instance, node: dict[str, Any]) -> Target:
    """The class of an argument, or another one of its kind that the node's `proto` names."""
    signature = read_signature(instance.path)
    registry = None
    if "proto" in node and not (signature and "proto" in signature.params):
        registry = kind_of(instance.path)
        if registry is not None and node["proto"] is not None:
            return named_target(registry, node)
    return Target(signature, instance.path, registry)


def schema_keys(read: Signature, data: Any, path: KeyPath = ()) -> list[str]:
    """All dotted keys that the schema of a configuration has, nested ones after their parents.

    Args:
        read: the signature of the section at `path`.
        data: the values, whose `proto`s decide on the schema.
        path: where the section stands.
    """
    found: list[tuple[int, str]] = []
    for name, param in read.settable.items():
        where = (*path, name)
        found.append((len(where), dotted(where)))
        if is_node(param.type):
            given = data.get(name) if isinstance(data, dict) else None
            given = given if isinstance(given, dict) else {}
            try:
                inner = target(param.type, given).signature
            except ConfigError:
                continue
            if inner is not None and len(path) < 8:
                found += [(key.count(".") + 1, key) for key in schema_keys(inner, given, where)]
    return [key for _, key in sorted(found, key=lambda entry: entry[0])]
