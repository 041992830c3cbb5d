"""Names that stand for a class, and the arguments of that class: registries, torch, torchvision."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import griffe

from vilmedic.config.annotations import (
    ANY,
    AnyOf,
    Basic,
    ListOf,
    Marked,
    Type,
    options,
    plain,
)
from vilmedic.config.foreign_bounds import bounded
from vilmedic.config.signature import (
    Param,
    Signature,
    derives_from,
    read_signature,
)
from vilmedic.config.sources import bases, find_class, read_module, wildcard_imports
from vilmedic.config.types import Calls
from vilmedic.errors import ConfigError, nearest
from vilmedic.registry import REGISTRIES, Registry

_TRANSFORMS = "torchvision.transforms.v2"
# what a namespace holds besides the classes that a configuration can name
_BASES = {
    "torch.optim": {"Optimizer"},
    "torch.optim.lr_scheduler": {"LRScheduler", "Optimizer"},
    _TRANSFORMS: {"Transform", "InterpolationMode", "AutoAugmentPolicy"},
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


@cache
def _members(namespace: str) -> dict[str, str]:
    """The public names of a module, each with the dotted path that it stands for."""
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
    return {
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
    return bounded(read.without(_GIVEN.get(namespace, set())), namespace)


@cache
def _configurable(namespace: str, name: str) -> bool:
    """Whether a configuration can hold every argument that a class needs."""
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
    """The registry whose names can stand in for a class, by its package or what it derives from.

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
