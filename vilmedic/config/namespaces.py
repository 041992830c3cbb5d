"""Lookup of classes and their arguments by name: registries, torch, torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import griffe

from vilmedic.config.signature import (
    Param,
    Signature,
    bases,
    derives_from,
    find_class,
    read_module,
    read_signature,
    wildcard_imports,
)
from vilmedic.config.tree import KeyPath, dotted
from vilmedic.config.types import (
    ANY,
    NUMBERS,
    Above,
    AnyMark,
    AnyOf,
    AtLeast,
    AtMost,
    Basic,
    Below,
    Between,
    Calls,
    Instance,
    ListOf,
    MapOf,
    Marked,
    NameIn,
    TupleOf,
    Type,
    instance_of,
    options,
    plain,
)
from vilmedic.errors import ConfigError, nearest
from vilmedic.registry import REGISTRIES, Registry

_TRANSFORMS = "torchvision.transforms.v2"
# names of a namespace that are not for configurations
_BASES = {
    "torch.optim": {"Optimizer"},
    "torch.optim.lr_scheduler": {"LRScheduler", "Optimizer"},
    _TRANSFORMS: {"Transform", "InterpolationMode", "AutoAugmentPolicy"},
}
# classes of this package that a configuration can name in a namespace of torch
OWN = {
    "torch.optim": {"LARS": "vilmedic.training.lars.LARS"},
    "torch.optim.lr_scheduler": {"WarmupCosineLR": "vilmedic.training.optimization.WarmupCosineLR"},
}
# classes that a run cannot use, and why
_REFUSED = {
    "torch.optim": {
        "LBFGS": "computes the loss several times a step, which a training step does once",
        "SparseAdam": "takes sparse gradients only, and the gradients of a model here are dense",
    }
}
# arguments that the framework gives, or that are part of a method
_GIVEN = {"torch.optim": {"params", "ns_coefficients"}, "torch.optim.lr_scheduler": {"optimizer"}}
_POSITIONAL = (griffe.ParameterKind.positional_only, griffe.ParameterKind.positional_or_keyword)
_REST = (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword)
Bounds = tuple[AnyMark, ...]


def _by_name(*groups: Any) -> dict[str, Bounds]:
    """Return the bounds of each argument, from groups of names with their shared bounds."""
    return {name: tuple(bounds) for names, *bounds in groups for name in names.split()}


# bounds of the numbers of torch and torchvision, whose signatures state none
_BOUNDS: dict[str, dict[str, Bounds]] = {
    "torch.optim": _by_name(
        ("lr step_sizes", Above(0), AtMost(1000)),
        ("alpha betas momentum rho", AtLeast(0), Below(1)),
        ("beta2_decay", Between(-1, 0)),
        ("d", Between(1, 1000000)),
        ("dampening lambd", Between(0, 1)),
        ("eps", Above(0), AtMost(1)),
        ("etas", Above(0), AtMost(100)),
        ("initial_accumulator_value lr_decay momentum_decay weight_decay", Between(0, 1000)),
        ("ns_steps", Between(1, 100)),
        ("t0", Between(0, 1000000000000)),
    ),
    "torch.optim.lr_scheduler": _by_name(
        (
            "T_0 T_max epochs milestones step_size step_size_down step_size_up steps_per_epoch "
            "total_iters total_steps",
            AtLeast(1),
        ),
        ("T_mult", Between(1, 1000)),
        ("base_lr eta_min min_lr threshold", Between(0, 1000)),
        ("base_momentum max_momentum", AtLeast(0), Below(1)),
        ("cooldown patience", AtLeast(0)),
        ("div_factor", Above(0), AtMost(1000000)),
        ("end_factor eps", Between(0, 1)),
        ("factor start_factor", Above(0), AtMost(1)),
        ("final_div_factor", Above(0), AtMost(1000000000000)),
        ("gamma", Above(0), AtMost(10)),
        ("last_epoch", Between(-1, -1)),
        ("max_lr", Above(0), AtMost(1000)),
        ("pct_start", Above(0), Below(1)),
        ("power", Between(0, 100)),
    ),
    _TRANSFORMS: _by_name(
        ("alpha", Above(0), AtMost(10000)),
        ("bits", Between(0, 8)),
        ("brightness contrast magnitude saturation sharpness_factor", Between(0, 1000)),
        ("center", Between(-16384, 16384)),
        ("chain_depth", Between(-1, 16)),
        ("degrees shear", Between(-360, 360)),
        ("distortion_scale p translate", Between(0, 1)),
        ("fill threshold", Between(0, 255)),
        ("hue", Between(-0.5, 0.5)),
        ("kernel_size", Between(1, 16383)),
        ("max_size min_size size target_size", Between(1, 16384)),
        ("mean value", Between(-1000, 1000)),
        ("mixture_width side_range", Between(1, 16)),
        ("num_magnitude_bins", Between(2, 1000)),
        ("num_ops", Between(0, 64)),
        ("num_output_channels", Between(1, 3)),
        ("num_samples trials", Between(1, 1000)),
        ("padding", Between(0, 4096)),
        ("quality", Between(1, 100)),
        ("ratio scale sigma std", Above(0), AtMost(1000)),
        ("scale_range", Above(0), AtMost(16)),
        ("severity", Between(1, 10)),
    ),
}


def names(namespace: str) -> list[str]:
    """The names that a configuration can use of a namespace, sorted.

    Args:
        namespace: the kind of a registry (`metric`) or a module (`torch.optim`).
    """
    if namespace in REGISTRIES:
        return REGISTRIES[namespace].names()
    return sorted(name for name in _members(namespace) if _configurable(namespace, name))


def signature(namespace: str, name: str) -> Signature | None:
    """The arguments that a configuration can give to a class of a namespace.

    Returns:
        Its signature; None when the source text does not show one.

    Raises:
        ConfigError: there is no such name.
    """
    if namespace in REGISTRIES:
        return read_signature(REGISTRIES[namespace].location(name))
    refused = _REFUSED.get(namespace, {})
    if name in refused:
        raise ConfigError(
            f"{namespace}.{name} {refused[name]}. Allowed: {', '.join(names(namespace))}."
        )
    if name not in _members(namespace):
        allowed = names(namespace)
        if not allowed:
            return None
        raise ConfigError(
            f"there is no '{name}' in {namespace}. Allowed: {', '.join(allowed)}."
            f"{nearest(name, allowed)}"
        )
    if not _configurable(namespace, name):
        raise ConfigError(
            f"{namespace}.{name} takes a function or an object, which a configuration cannot give. "
            f"Allowed: {', '.join(names(namespace))}."
        )
    return _member_signature(namespace, name)


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


@cache
def _members(namespace: str) -> dict[str, str]:
    """Return the public names of a module, each with its dotted path."""
    module = read_module(namespace)
    if module is None:
        return {}
    found: dict[str, str] = {}
    for target in wildcard_imports(module):
        if target.partition(".")[0] == namespace.partition(".")[0]:
            found.update(_members(target))
    for name, member in module.members.items():
        if isinstance(member, griffe.Alias):
            if member.wildcard or not member.target_path.startswith(f"{namespace}."):
                continue
            # an imported module is not a class
            if read_module(member.target_path) is None:
                found[name] = member.target_path
        elif isinstance(member, griffe.Class):
            found[name] = f"{namespace}.{name}"
    hidden = _BASES.get(namespace, set())
    return OWN.get(namespace, {}) | {
        name: path
        for name, path in found.items()
        if not name.startswith("_")
        and name not in hidden
        and (name[0].isupper() or namespace not in _BASES)
    }


@cache
def _member_signature(namespace: str, name: str) -> Signature | None:
    read = read_signature(_members(namespace)[name])
    if read is None:
        return None
    if namespace == _TRANSFORMS and "transforms" in read.params:
        # transforms that hold transforms: RandomApply, RandomChoice
        held = replace(read.params["transforms"], type=Marked(ListOf(ANY), Calls(namespace)))
        read = replace(read, params={**read.params, "transforms": held})
    stated = _BOUNDS.get(namespace, {})
    otherwise = (Between(-16384, 16384),) if namespace == _TRANSFORMS else ()
    given = read.without(_GIVEN.get(namespace, set()))
    return bounded(given, lambda argument: stated.get(argument, otherwise))


@cache
def _configurable(namespace: str, name: str) -> bool:
    """Return whether a configuration can give every required argument of a class."""
    if namespace not in _BASES:
        return True
    if name in _REFUSED.get(namespace, {}):
        return False
    if namespace == "torch.optim.lr_scheduler" and not derives_from(
        _members(namespace)[name], f"{namespace}.LRScheduler"
    ):
        return False
    read = _member_signature(namespace, name)
    return read is None or not any(_foreign(param) for param in read.params.values())


def _foreign(param: Param) -> bool:
    return param.required and all(_is_foreign(option) for option in options(param.type))


def _is_foreign(kind: Type) -> bool:
    kind = plain(kind)
    if isinstance(kind, ListOf):
        return _is_foreign(kind.item)
    if isinstance(kind, AnyOf):
        return all(_is_foreign(option) for option in kind.options)
    return kind == Basic("foreign")


def kind_of(path: str) -> Registry | None:
    """Return the registry whose classes can replace a class, by its package or base class.

    Args:
        path: dotted path of the class.

    Returns:
        The registry; None when the class belongs to none.
    """
    package = path.split(".")[:2]
    for registry in REGISTRIES.values():
        if registry.group == ".".join(package):
            return registry
        if path in (place.replace(":", ".") for place in registry.locations()):
            return registry
    cls = find_class(path)
    for base in bases(cls) if cls is not None else ():
        found = kind_of(base) if base != path else None
        if found is not None:
            return found
    return None


def bounded(read: Signature, bounds_of: Callable[[str], Bounds]) -> Signature:
    """Add bounds to the numbers in the signature of another package.

    Args:
        read: the signature.
        bounds_of: returns the bounds of an argument by its name.
    """
    params = {
        name: replace(param, type=_within(param.type, bounds_of(name)))
        for name, param in read.params.items()
    }
    return replace(read, params=params)


def _within(kind: Type, bounds: Bounds) -> Type:
    """A type with bounds on the numbers in it."""
    if kind in NUMBERS or kind == ANY:
        for bound in bounds:
            kind = Marked(kind, bound)
        return kind
    if isinstance(kind, AnyOf):
        return AnyOf(tuple(_within(option, bounds) for option in kind.options))
    if isinstance(kind, ListOf):
        return ListOf(_within(kind.item, bounds), kind.container)
    if isinstance(kind, TupleOf):
        return TupleOf(tuple(_within(item, bounds) for item in kind.items))
    if isinstance(kind, MapOf):
        return MapOf(_within(kind.value, bounds))
    return kind


# -- nodes


@dataclass(frozen=True)
class Target:
    """The class of a node.

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
    """Return whether a mapping of a type becomes an object."""
    return registry_of(kind) is not None or instance_of(kind) is not None


def target(kind: Type, node: dict[str, Any]) -> Target:
    """Return the class of a node.

    Args:
        kind: the type of the node in the signature.
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
            found = named_target(registry, node)
            if registry.kind == "loss":
                _same_call(found.path, instance.path)
            return found
    return Target(signature, instance.path, registry)


def _same_call(given: str, wanted: str) -> None:
    """Refuse a loss with other inputs than the one it replaces."""
    forward, model = method(given, "forward"), method(wanted, "forward")
    if forward is None or model is None:
        return
    takes, gives = list(_required(forward)), list(_required(model))
    places = [p for p in forward.parameters if p.kind in _POSITIONAL]
    most = math.inf if any(p.kind in _REST for p in forward.parameters) else len(places) - 1
    if not len(takes) <= len(gives) <= most:
        names = [place.rpartition(".")[2] for place in (given, wanted)]
        raise ConfigError(
            f"given {names[0]}, which compares {', '.join(takes)}; this model gives its loss "
            f"{', '.join(gives)}. Allowed: {names[1]}, or a loss called with as many tensors."
        )


def method(path: str, name: str) -> griffe.Function | None:
    """Return a method of a class, possibly inherited; None if the source text shows none."""
    cls = find_class(path)
    if cls is None:
        return None
    found = cls.members.get(name)
    if isinstance(found, griffe.Function):
        return found
    inherited = (method(base, name) for base in bases(cls) if base != path)
    return next((one for one in inherited if one is not None), None)


def _required(method: griffe.Function) -> Iterator[str]:
    """The arguments of a method that a call has to give, without the object itself."""
    for parameter in list(method.parameters)[1:]:
        if parameter.default is None and parameter.kind not in _REST:
            yield parameter.name


def schema_keys(read: Signature, data: Any, path: KeyPath = ()) -> list[str]:
    """All dotted keys that the schema of a configuration has, nested ones after their parents.

    Args:
        read: the signature of the section at `path`.
        data: the values, whose `proto` keys choose the schema.
        path: the path of the section.
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
