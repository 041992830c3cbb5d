"""One checked configuration out of files and a command line."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vilmedic.config.annotations import Marked, Type, instance_of, options
from vilmedic.config.build import entries
from vilmedic.config.check import Checker
from vilmedic.config.fit import misfits
from vilmedic.config.layers import merge, read_layers
from vilmedic.config.marks import KeyPath, Mark, Tree
from vilmedic.config.nodes import schema_keys
from vilmedic.config.optimizers import check_optimizer
from vilmedic.config.overrides import Override, apply_overrides, parse_override
from vilmedic.config.replaced import drop_replaced
from vilmedic.config.resolve import MOST_PROBLEMS, guard, resolve
from vilmedic.config.scalars import wrong_folder_name
from vilmedic.config.scores import read_scores
from vilmedic.config.sections import (
    EnsemblorSection,
    RunSection,
    TrainorSection,
    ValidatorSection,
)
from vilmedic.config.signature import Signature, read_signature
from vilmedic.config.types import Calls
from vilmedic.config.wording import shown
from vilmedic.config.yaml_source import PlainDumper
from vilmedic.errors import ConfigError
from vilmedic.registry import import_plugins

ROOT = f"{RunSection.__module__}.{RunSection.__name__}"


class Node(dict[str, Any]):
    """A mapping of a configuration that knows where it stands.

    Args:
        data: the keys and values.
        path: where the mapping stands.
        tree: the configuration that it is part of, for the origins of its keys.
    """

    def __init__(self, data: dict[str, Any], path: KeyPath, tree: Tree) -> None:
        super().__init__(data)
        self.path = path
        self.tree = tree


@dataclass(frozen=True)
class Config:
    """A configuration without a known fault.

    Args:
        run: all of it, typed.
        data: all of it as plain values; the framework's own sections hold their defaults.
        tree: the values that were given, with their marks.
        overrides: the words of the command line.
        notes: one line for each choice that made keys of lower layers meaningless.
        path: the configuration file.
    """

    run: RunSection
    data: dict[str, Any]
    tree: Tree
    overrides: tuple[str, ...]
    notes: tuple[str, ...]
    path: str

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.run.name)

    @property
    def run_dir(self) -> Path:
        """The folder that the run is written to: `<ckpt_dir>/<name>`."""
        return Path(self.run.ckpt_dir) / self.name

    @property
    def ckpt(self) -> str | None:
        """The checkpoint to continue from or to evaluate."""
        return self.run.ckpt

    @property
    def dataset(self) -> Node:
        """The node of the data set, for `build(DATASETS, ...)`."""
        return Node(self.run.dataset, ("dataset",), self.tree)

    @property
    def model(self) -> Node:
        """The node of the model, for `build(MODELS, ...)`."""
        return Node(self.run.model, ("model",), self.tree)

    @property
    def trainor(self) -> TrainorSection:
        """How the model is trained."""
        return self.run.trainor

    @property
    def validator(self) -> ValidatorSection:
        """How the model is scored during training."""
        return self.run.validator

    @property
    def ensemblor(self) -> EnsemblorSection:
        """How trained checkpoints are evaluated."""
        return self.run.ensemblor

    @property
    def origins(self) -> dict[str, str]:
        """Dotted key to `file:line` or `command line`, for every value that was given."""
        return {".".join(map(str, path)): mark.origin for path, mark in self.tree.marks.items()}

    def to_yaml(self) -> str:
        """The resolved configuration; reading it gives the same configuration."""
        return to_yaml(self.data)


@dataclass(frozen=True)
class Draft:
    """A configuration that was read and not yet judged.

    Args:
        tree: the resolved values.
        problems: what went wrong so far.
        notes: one line for each choice that made keys of lower layers meaningless.
    """

    tree: Tree
    problems: list[str]
    notes: list[str]


def load(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, training: bool = False
) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: the YAML file.
        overrides: words as on the command line, `key=value` and `~key`.
        training: whether it is to be trained with: refuses what an evaluation alone can do with.

    Returns:
        The configuration.

    Raises:
        ConfigError: every problem that was found, at once.
    """
    draft = read(os.fspath(path), overrides)
    root = root_signature()
    tree = draft.tree
    checker = Checker(tree, cache(lambda: schema_keys(root, tree.data)))
    judged = checker.section(root, tree.data, ())
    check_optimizer(checker, judged)
    if not (draft.problems or checker.problems):
        _check_score(judged, checker)
    problems = [*draft.problems, *checker.problems]
    if not problems:
        problems += misfits(tree, judged, training=training)
    if problems:
        raise ConfigError(problems)
    judged["name"] = judged.get("name") or Path(path).stem
    wrong = wrong_folder_name(judged["name"])
    if wrong:
        raise ConfigError(f"name: given {shown(judged['name'])}, that of the file; {wrong}")
    sections = {"trainor": TrainorSection, "validator": ValidatorSection}
    for key, cls in {**sections, "ensemblor": EnsemblorSection}.items():
        judged[key] = cls(**judged.get(key) or {})
    run = RunSection(**judged)
    notes = (*draft.notes, *checker.notes)
    return Config(run, asdict(run), tree, tuple(overrides), notes, os.fspath(path))


def read(path: str, words: Iterable[str] = ()) -> Draft:
    """Read and merge a configuration without judging its values.

    Raises:
        ConfigError: a file cannot be read at all.
    """
    problems: list[str] = []
    overrides: list[Override] = []
    for word in words:
        try:
            overrides.append(parse_override(word))
        except ConfigError as error:
            problems += error.problems
    try:
        layers, notes = read_layers(path)
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from None
    problems += _plugins(layers, overrides)
    root = root_signature()
    defaults = default_values(path)
    for number, layer in enumerate(layers):
        layer.stamp(number)
    tree = layers[0]
    for layer in layers[1:]:
        notes += drop_replaced(tree, layer, root, defaults)
        tree = merge(tree, layer)
    _start_from_defaults(tree, overrides, defaults)
    last, wrong = apply_overrides(overrides, tree)
    last.stamp(len(layers))
    last.removed = {key: replace(mark, layer=len(layers)) for key, mark in last.removed.items()}
    guard(last)
    problems += wrong
    if last.data or last.removed:
        notes += drop_replaced(tree, last, root, defaults)
        tree = merge(tree, last)
    tree, broken = resolve(tree, defaults)
    return Draft(tree, problems + broken, notes)


def default_values(path: str) -> dict[str, Any]:
    """The values of the framework's own keys when nothing is given."""
    values = asdict(RunSection(name=Path(path).stem, dataset={}, model={}))
    return {key: value for key, value in values.items() if key not in ("dataset", "model")}


def root_signature() -> Signature:
    """The signature of the whole configuration."""
    root = read_signature(ROOT)
    if root is None or instance_of(root.params["trainor"].type) is None:
        raise RuntimeError(f"the source text of {ROOT} cannot be read")
    return root


def _start_from_defaults(tree: Tree, overrides: list[Override], defaults: dict[str, Any]) -> None:
    """Put defaults that are sections of names into the files' values where a word goes inside one.

    `ensemblor.metrics.knn=null` adds to the protocols of the files, or to the default one.
    """
    for override in overrides:
        if len(override.path) < 3 or tree.has(override.path[:2]):
            continue
        section, key = override.path[:2]
        kind = _section_type(section, key)
        calls = kind is not None and any(
            isinstance(one, Marked) and isinstance(one.mark, Calls) for one in options(kind)
        )
        default = defaults[section][key] if calls else None
        values = tree.data.setdefault(section, {}) if default else None
        if isinstance(values, dict):
            values[key] = copy.deepcopy(default)
            tree.marks[section, key] = Mark("default")


def _section_type(section: str, key: str) -> Type | None:
    """The type of a key of one of the framework's own sections; None for other keys."""
    param = root_signature().params.get(section)
    instance = instance_of(param.type) if param is not None else None
    read = read_signature(instance.path) if instance is not None else None
    return read.params[key].type if read is not None and key in read.params else None


def _check_score(judged: dict[str, Any], checker: Checker) -> None:
    """Refuse a score to judge a run by that no evaluation of it gives."""
    trainor = TrainorSection(**judged.get("trainor") or {})
    validator = ValidatorSection(**judged.get("validator") or {})
    metrics = [name for name, _ in entries(validator.metrics)]
    try:
        scores = read_scores(validator.splits, metrics, ema=trainor.ema is not None)
        scores.better(trainor.early_stop_metric)
    except ConfigError as error:
        checker.report(("trainor", "early_stop_metric"), str(error))


def _plugins(layers: list[Tree], overrides: list[Override]) -> list[str]:
    """Import the plugins that the strongest layer names; their classes are part of the schema."""
    found = Tree()
    for layer in layers:
        if "plugins" in layer.data:
            found = Tree({"plugins": layer.data["plugins"]}, layer.marks)
    for override in overrides:
        if override.path == ("plugins",):
            marks = {("plugins", *path): mark for path, mark in override.marks.items()}
            found = Tree({"plugins": override.value}, marks)
    given = found.data.get("plugins")
    names = [one for one in given if isinstance(one, str)] if isinstance(given, list) else []
    origin = found.origin(("plugins",))
    if len(names) > MOST_PROBLEMS:
        return [f"plugins ({origin}): given {len(names)}; allowed: at most {MOST_PROBLEMS}."]
    return [f"plugins ({origin}): {problem}" for problem in import_plugins(names)]


def to_yaml(data: Any) -> str:
    """Plain values as YAML that `load` reads back unchanged."""
    text: str = yaml.dump(
        data,
        Dumper=PlainDumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
        default_flow_style=False,
    )
    return text
