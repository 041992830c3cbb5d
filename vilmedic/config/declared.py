"""Metric and model declarations read from class bodies, and checked against a configuration.

A metric declares its numbers as a literal mapping,

    numbers: ClassVar = {"auroc": "higher", "*_uniformity": "lower", "words": "neither"}

where `*` stands for any text, as in numbers named after features: these are the scores that can
rank a run. A model declares its requirements by attributes of its class in the same way
(`vilmedic.models.contract.Model`). Both are read from the source text, without importing the class,
so that incompatible settings are found before torch is loaded.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import griffe

from vilmedic.config.namespaces import Target, entries, method, named_target, target
from vilmedic.config.namespaces import signature as options_of
from vilmedic.config.sections import TrainorSection, ValidatorSection
from vilmedic.config.signature import Param, bases, derives_from, find_class, read_signature
from vilmedic.config.tree import KeyPath, Tree, dotted
from vilmedic.config.types import Above, AtMost, Between, instance_of
from vilmedic.config.wording import shown
from vilmedic.errors import ConfigError, nearest
from vilmedic.log import counted
from vilmedic.registry import DATASETS, METRICS, MODELS

Better = Literal["higher", "lower", "neither"]
Declared = Mapping[str, str]
"""Names of numbers, or patterns of them, with the better direction."""

BETTER = ("higher", "lower", "neither")
PUBLISHED_NAMES = {"validate": "validation"}
"""Score names start with the split; `validate` gives the published name `validation_loss`."""
EMA = "ema_"
"""Prefix of the scores of the averaged copy that `trainor.ema` keeps."""
KEY = "trainor.early_stop_metric"

IMAGES = "vilmedic.datasets.image.ImageDataset"
REPORTS = "vilmedic.datasets.text.TextDataset"
LABELS = "vilmedic.datasets.label.LabelDataset"

T = TypeVar("T")


def constant(path: str, name: str) -> Any:
    """Return a literal attribute of a class or its base classes; None without one.

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


def distinct(calls: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """Number repeated names: `knn`, `knn_2`."""
    seen: dict[str, int] = {}
    named = []
    for name, call in calls:
        seen[name] = seen.get(name, 0) + 1
        named.append((name if seen[name] == 1 else f"{name}_{seen[name]}", call))
    return named


def declared_numbers(metric: str) -> dict[str, str] | None:
    """Return the numbers that a metric declares, read from its source text.

    Args:
        metric: its name in a configuration.

    Returns:
        None when the text does not show them, or there is no such metric.
    """
    try:
        location = METRICS.location(metric)
    except ConfigError:
        return None
    value = constant(location.replace(":", "."), "numbers")
    return value if is_declaration(value) else None


def is_declaration(value: Any) -> bool:
    """Return whether a value is a valid declaration of numbers."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and better in BETTER for name, better in value.items()
    )


class Scores:
    """The scores of an evaluation during training.

    Args:
        splits: the splits that are scored.
        metrics: each metric's name among the scores, and its declared numbers; None if unknown.
        ema: whether the averaged copy is scored as well.
    """

    def __init__(
        self, splits: Iterable[str], metrics: Iterable[tuple[str, Declared | None]], *, ema: bool
    ) -> None:
        self._known: dict[str, str] = {}
        self._unknown: list[str] = []
        self._ema = ema
        metrics = list(metrics)
        for copy in ("", EMA) if ema else ("",):
            for split in splits:
                prefix = f"{copy}{PUBLISHED_NAMES.get(split, split)}"
                self._known[f"{prefix}_loss"] = "lower"
                for name, numbers in metrics:
                    if numbers is None:
                        self._unknown.append(f"{prefix}_{name}_*")
                    for number, better in (numbers or {}).items():
                        self._known[f"{prefix}_{name}_{number}"] = better

    def better(self, score: str) -> str | None:
        """Return which direction is better; None for a metric without a declaration.

        Args:
            score: the name of a score.

        Raises:
            ConfigError: there is no such score, or it has no direction.
        """
        found = self._known.get(score) or next(
            (better for known, better in self._known.items() if fnmatchcase(score, known)), None
        )
        if found in ("higher", "lower"):
            return found
        if found is None and any(fnmatchcase(score, pattern) for pattern in self._unknown):
            return None
        fit = [name for name, better in self._known.items() if better != "neither"]
        fit += self._unknown
        problem = "an evaluation of this configuration does not give it"
        if found == "neither":
            problem = "neither a higher nor a lower value of it is better"
        plain = ", ".join(name for name in fit if not name.startswith(EMA))
        plain = plain or "none, as validator.splits is empty"
        copies = f", and those of the average with {EMA} in front" if self._ema else ""
        raise ConfigError(
            f"given '{score}', but {problem}. Allowed: {plain}{copies}.{nearest(score, fit)}"
        )


def read_scores(splits: Iterable[str], metrics: Iterable[str], *, ema: bool) -> Scores:
    """Return the scores of a configuration, by the source text of its metrics."""
    named = distinct((name, declared_numbers(name)) for name in metrics)
    return Scores(splits, named, ema=ema)


def known_better(score: str) -> str | None:
    """Return which direction of a score is better, by its name alone.

    For checkpoints and pages that only have the name.

    Args:
        score: such as `validation_loss` or `ema_validation_knn_2_auroc`.

    Returns:
        None when no metric that is known declares it.
    """
    for metric in METRICS.names():
        match = re.search(rf"_{re.escape(metric)}(?:_\d+)?_(\w+)$", score)
        for number, better in (declared_numbers(metric) or {}).items() if match else ():
            if match is not None and fnmatchcase(match[1], number):
                return None if better == "neither" else better
    return "lower" if score == "loss" or score.endswith("_loss") else None


# -- settings that must fit together


def wrong_optimizer(tree: Tree, data: dict[str, Any]) -> Iterator[str]:
    """Refuse Muon, which updates only matrices, for a model with other weights.

    Every model of this package has biases and normalisation scales. A model of a plugin may have
    matrices only; its weights are checked when the optimizer is made.

    Args:
        tree: the values that were given, for their origins.
        data: the checked configuration, which may have other problems.
    """
    section, node = data.get("trainor"), data.get("model")
    if not isinstance(section, dict) or section.get("optimizer") != "Muon":
        return
    proto = node.get("proto") if isinstance(node, dict) else None
    try:
        location = MODELS.location(str(proto))
    except ConfigError:
        return  # told where it stands
    if location.startswith("vilmedic."):
        yield (
            f"{tree.where(('trainor', 'optimizer'))}: given 'Muon', which updates matrices only, "
            f"and {proto} has biases and other weights that are none. Use AdamW or another "
            "optimizer."
        )


GROUP_NUMBERS = Between(0, 1000)
"""The bounds of every number in `trainor.optim_groups`, as its type states them."""
GROUP_OPTIONS = {
    "lr": (Above(0), AtMost(1000)),
    "weight_decay": (GROUP_NUMBERS,),
    "layer_decay": (Above(0), AtMost(1)),
}
"""Options of an entry of `trainor.optim_groups`, with their bounds."""


def wrong_groups(tree: Tree, data: dict[str, Any]) -> Iterator[str]:
    """Refuse groups of weights without a matching part of the model, and options without effect.

    Patterns, and names inside a part, are checked when the optimizer is made.

    Args:
        tree: the values that were given, for their origins.
        data: the checked configuration, which may have other problems.
    """
    section, node = data.get("trainor"), data.get("model")
    groups = section.get("optim_groups") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(groups, dict) or not isinstance(node, dict):
        return
    parts = _parts(node)
    unused = _without_effect(section)
    for name, options in groups.items():
        where = ("trainor", "optim_groups", name)
        first = name.partition(".")[0]
        if parts and first not in parts and not set(first) & set("*?["):
            yield (
                f"{tree.where(where)}: the model has no part '{first}'. Allowed: "
                f"{', '.join(parts)}, a dotted name inside one of them, or a pattern of names "
                f"(*.bias).{nearest(first, parts)}"
            )
        for key, value in options.items() if isinstance(options, dict) else ():
            bounds, place = GROUP_OPTIONS.get(key), tree.where((*where, key))
            raw = tree.get((*where, key)) if tree.has((*where, key)) else None
            if isinstance(raw, dict):  # that it is no number is told already
                inside, given = _inside((name, key), raw)
                words = f"{{{', '.join(f'{one}: {shown(given[one])}' for one in given)}}}"
                yield (
                    f"{place}: dots separate keys here. Give the name of what lies inside a part "
                    f"as one: trainor.optim_groups={{{inside}: {words}}}"
                )
            elif bounds is None:
                yield (
                    f"{place}: unknown key. Allowed: "
                    f"{', '.join(GROUP_OPTIONS)}.{nearest(key, GROUP_OPTIONS)}"
                )
            elif key in unused:
                yield f"{place}: has no effect, as {section['optimizer']} has no such option."
            elif (
                isinstance(value, int | float)
                and GROUP_NUMBERS.allows(value)  # others are told already
                and not all(one.allows(value) for one in bounds)
            ):
                words = " and ".join(one.words() for one in bounds)
                yield f"{place}: given {shown(value)}; allowed: {words}."
    if groups and (rates := _own_rates(node)):
        others = ", ".join(f"model.{key}" for key in rates)
        yield (
            f"{tree.where(('trainor', 'optim_groups'))}: given beside {others}, by which the model "
            f"gives rates to its parts itself. Leave one of the two out: "
            f"{' '.join(f'~model.{key}' for key in rates)}"
        )


def _inside(names: tuple[str, ...], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A dotted name that was read as keys in keys, and the options that it is given."""
    while len(given) == 1 and isinstance(value := next(iter(given.values())), dict):
        names, given = (*names, next(iter(given))), value
    return ".".join(names), given


def _without_effect(section: dict[str, Any]) -> list[str]:
    """Options of groups that the optimizer does not have."""
    try:
        known = options_of("torch.optim", str(section.get("optimizer", "Adam")))
    except ConfigError:
        return []  # told where it stands
    return [] if known is None or "weight_decay" in known.params else ["weight_decay"]


def _own_rates(node: dict[str, Any]) -> list[str]:
    """The keys of a model that are given and set rates of its parts."""
    path, params = _model(node)
    return [
        key
        for key in constant(path, "own_rates") or ()
        if key in params and node.get(key, params[key].default) != params[key].default
    ]


def wrong_warmup(tree: Tree, data: dict[str, Any]) -> Iterator[str]:
    """Refuse a warm-up that is as long as a run of a given number of steps.

    How many steps an epoch has is known once the data are read.

    Args:
        tree: the values that were given, for their origins.
        data: the checked configuration, which may have other problems.
    """
    section = data.get("trainor")
    if not isinstance(section, dict) or section.get("lr_decay") != "WarmupCosineLR":
        return
    options = section.get("lr_decay_params")
    options = options if isinstance(options, dict) else {}
    warmup = options.get("warmup")
    length = options.get("total_steps") or section.get("steps")
    if type(warmup) is int and type(length) is int and warmup >= length:
        key = ("trainor", "lr_decay_params", "warmup")
        yield (
            f"{tree.where(key)}: given {warmup}, but the schedule has {counted(length, 'step')}. "
            "Give fewer, "
            "or a share of the run such as 0.1."
        )


def _parts(node: dict[str, Any]) -> list[str]:
    """The parts of a model that have weights, as its constructor and its class name them."""
    path, params = _model(node)
    named = [name for name, param in params.items() if instance_of(param.type) is not None]
    return [*named, *(constant(path, "further_parts") or ())]


def _model(node: dict[str, Any]) -> tuple[str, dict[str, Param]]:
    """The path of the class of a model and its arguments; empty for a class that is not known."""
    try:
        model = named_target(MODELS, node)
    except ConfigError:
        return "", {}
    return model.path, {} if model.signature is None else model.signature.settable


def wrong_score(tree: Tree, data: dict[str, Any]) -> Iterator[str]:
    """Refuse an early-stop score that no evaluation of the run gives.

    Args:
        tree: the values that were given, for their origins.
        data: the checked configuration.
    """
    trainor = TrainorSection(**data.get("trainor") or {})
    validator = ValidatorSection(**data.get("validator") or {})
    metrics = [name for name, _ in entries(validator.metrics)]
    try:
        scores = read_scores(validator.splits, metrics, ema=trainor.ema is not None)
        scores.better(trainor.early_stop_metric)
    except ConfigError as error:
        yield f"{tree.where(('trainor', 'early_stop_metric'))}: {error}"


def misfits(tree: Tree, data: dict[str, Any], *, training: bool) -> Iterator[str]:
    """One text for each setting that the model cannot work with.

    Args:
        tree: the values that were given, for their origins.
        data: the checked configuration.
        training: whether it will be trained with, which asks more than an evaluation does.
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
        if given.get("image_choice") == "random" and given.get("multi_image", 1) == 1:
            key = (*path, "image_choice")
            yield (
                f"{tree.where(key)}: given 'random', which draws among the first images of a "
                f"sample, as many as {dotted((*path, 'multi_image'))} says: 1. Set that higher."
            )
    yield from _targets(tree, data, model, dataset, training=training)
    if not dataset.path.startswith("vilmedic."):
        return  # one of a plugin may have them in a way of its own
    if images is None and wanted and training:
        yield _lacks(tree, data, model, "images")
    if reports is None and constant(model.path, "reads_reports"):
        yield _lacks(tree, data, model, "reports")
    labels = _part(dataset, data["dataset"], LABELS)
    if labels is None and training and constant(model.path, "reads_labels"):
        yield _lacks(tree, data, model, "labels")


NO_ENCODER = (
    "not given, but 'by: reports' compares reports under a frozen text encoder. Allowed: the "
    "folder or the hub name of a model of transformers, whose tokenizer the reports have."
)
"""Why targets by reports are refused without an encoder."""


def no_targets(loss: str, given: str, why: str = "does not take them") -> str:
    """Why a loss takes no further positives.

    Args:
        loss: its name.
        given: the targets.
        why: what the loss says.
    """
    return f"given '{given}', which adds positives to a batch, but {loss} {why}. Allowed: identity."


def _targets(
    tree: Tree, data: dict[str, Any], model: Target, dataset: Target, *, training: bool
) -> Iterator[str]:
    """Targets that the loss cannot take, or that are made of what the data set does not give."""
    params = model.signature.settable if model.signature else {}
    node = data["model"].get("targets", "identity")
    proto = node.get("proto", "soft") if isinstance(node, dict) else node
    if "targets" not in params or "loss" not in params or proto not in ("same_text", "soft"):
        return
    where = tree.where(("model", "targets"))
    loss = target(params["loss"].type, data["model"].get("loss") or {})
    name = loss.path.rpartition(".")[2]
    takes = method(loss.path, "forward")
    if constant(loss.path, "negatives") is False:
        why = "has no negatives: it pushes no two reports apart, equal or not"
        yield f"{where}: {no_targets(name, proto, why)}"
    elif takes is not None and "targets" not in [one.name for one in takes.parameters]:
        yield f"{where}: {no_targets(name, proto)}"
    by = node.get("by", "labels") if isinstance(node, dict) else "labels"
    if (proto, by) == ("soft", "reports") and node.get("encoder") is None:
        yield f"{tree.where(('model', 'targets', 'encoder'))}: {NO_ENCODER}"
    if training and (proto, by) == ("soft", "labels") and dataset.path.startswith("vilmedic."):
        labels = _part(dataset, data["dataset"], LABELS)
        if labels is None or not labels[1]:
            yield (
                f"{where}: given 'soft', which compares the labels of samples, but "
                f"{dataset.name} gives none. Set dataset.proto=ImSeqLabel and dataset.label.root, "
                "model.targets={proto: soft, by: reports, encoder: <folder>} or "
                "model.targets=same_text."
            )


def _batches(tree: Tree, data: dict[str, Any], model: Target) -> Iterator[str]:
    for section in ("trainor", "validator"):
        key = (section, "batch_size")
        if (data.get(section) or {}).get("batch_size", 2) < 2:
            yield (
                f"{tree.where(key)}: given 1, but {model.name} compares the "
                "samples of a batch. Allowed: integer >= 2."
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
        f"{tree.where(key)}: given '{proto}', but {model.name} needs {what}. "
        f"Allowed: {', '.join(fitting)}."
    )


def _has(name: str, what: str) -> bool:
    target = named_target(DATASETS, {"proto": name})
    kind = {"images": IMAGES, "reports": REPORTS, "labels": LABELS}[what]
    alone = what != "images" and derives_from(target.path, kind)
    return not alone and _part(target, {}, kind) is not None
