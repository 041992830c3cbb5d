"""Checks what the data set gives against what the model takes, as far as a configuration shows.

What a model takes is said by attributes of its class (`vilmedic.models.contract.Model`), which are
read as text, as signatures are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import griffe

from vilmedic.config.annotations import instance_of
from vilmedic.config.marks import KeyPath, Tree, dotted
from vilmedic.config.nodes import Target, named_target
from vilmedic.config.signature import derives_from, read_signature
from vilmedic.config.sources import bases, find_class
from vilmedic.config.wording import shown
from vilmedic.errors import ConfigError
from vilmedic.registry import DATASETS, MODELS

IMAGES = "vilmedic.datasets.image.ImageDataset"
REPORTS = "vilmedic.datasets.text.TextDataset"


def misfits(tree: Tree, data: dict[str, Any], *, training: bool) -> Iterator[str]:
    """One text for each setting that the model cannot work with.

    Args:
        tree: the values that were given, for their origins.
        data: the judged configuration.
        training: whether it is to be trained with, which asks more than an evaluation does.
    """
    try:
        model = named_target(MODELS, data["model"])
        dataset = named_target(DATASETS, data["dataset"])
    except (ConfigError, KeyError, TypeError):
        return  # told where it stands
    if training and constant(model.path, "cross_sample"):
        yield from _batches(tree, data, model)
    images = _part(dataset, data["dataset"], IMAGES)
    reports = _part(dataset, data["dataset"], REPORTS)
    wanted = constant(model.path, "image_options") or {}
    if training:
        wanted = {**wanted, **(constant(model.path, "training_image_options") or {})}
    if images is not None:
        path, given = images
        for option, allowed in wanted.items():
            yield from _option(tree, path, given, option, allowed, model)
    if not dataset.path.startswith("vilmedic."):
        return  # one of a plugin may have them in a way of its own
    if images is None and wanted and training:
        yield _lacks(tree, data, model, "images")
    if reports is None and constant(model.path, "reads_reports"):
        yield _lacks(tree, data, model, "reports")


def constant(path: str, name: str) -> Any:
    """A literal attribute of a class or of a class that it derives from; None when there is none.

    Args:
        path: dotted path of the class.
        name: the attribute.
    """
    cls = find_class(path)
    if cls is None:
        return None
    member = cls.members.get(name)
    if isinstance(member, griffe.Attribute) and member.value is not None:
        try:
            return ast.literal_eval(str(member.value))
        except (ValueError, SyntaxError):
            return None
    for base in bases(cls):
        found = constant(base, name) if base != path else None
        if found is not None:
            return found
    return None


def _batches(tree: Tree, data: dict[str, Any], model: Target) -> Iterator[str]:
    for section in ("trainor", "validator"):
        key = (section, "batch_size")
        if (data.get(section) or {}).get("batch_size", 2) < 2:
            yield (
                f"{dotted(key)} ({tree.origin(key)}): given 1, but {model.name} compares the "
                "samples of a batch. Allowed: 2 or more."
            )


def _part(
    dataset: Target, node: dict[str, Any], kind: str
) -> tuple[KeyPath, dict[str, Any]] | None:
    """Where a data set says how its images, or its reports, are read, and what it says."""
    if derives_from(dataset.path, kind):
        return ("dataset",), node
    for name, param in (dataset.signature.settable if dataset.signature else {}).items():
        instance = instance_of(param.type)
        if instance is not None and derives_from(instance.path, kind):
            return ("dataset", name), node.get(name) or {}
    return None


def _option(
    tree: Tree,
    path: KeyPath,
    given: dict[str, Any],
    option: str,
    allowed: tuple[Any, ...],
    model: Target,
) -> Iterator[str]:
    read = read_signature(IMAGES)
    default = read.params[option].default if read is not None else None
    value = given.get(option, default)
    if value in allowed:
        return
    key = (*path, option)
    origin = tree.origin(key) if tree.has(key) else "default"
    listed = " or ".join(shown(one) for one in allowed)
    yield (
        f"{dotted(key)} ({origin}): given {shown(value)}, but {model.name} works with {listed} "
        f"only. Set {dotted(key)}={shown(allowed[0]).replace(' ', '')}."
    )


def _lacks(tree: Tree, data: dict[str, Any], model: Target, what: str) -> str:
    key = ("dataset", "proto")
    proto = data["dataset"]["proto"]
    fitting = [name for name in DATASETS.names() if _has(name, what)]
    return (
        f"{dotted(key)} ({tree.origin(key)}): given '{proto}', but {model.name} needs {what}. "
        f"Allowed: {', '.join(fitting)}."
    )


def _has(name: str, what: str) -> bool:
    target = named_target(DATASETS, {"proto": name})
    alone = derives_from(target.path, REPORTS) if what == "reports" else False
    kind = REPORTS if what == "reports" else IMAGES
    return not alone and _part(target, {}, kind) is not None
