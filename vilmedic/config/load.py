"""Loading and validating a configuration, and building the objects that it describes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from vilmedic.config.check import Checker, Items, PathText, Plan, plain_data
from vilmedic.config.declared import (
    misfits,
    wrong_groups,
    wrong_optimizer,
    wrong_score,
    wrong_warmup,
)
from vilmedic.config.layers import apply_overrides, drop_replaced, merge, read_layers
from vilmedic.config.namespaces import Target, entries, schema_keys
from vilmedic.config.sections import (
    EnsemblorSection,
    RunSection,
    TrainorSection,
    ValidatorSection,
)
from vilmedic.config.signature import Signature, find_class, read_signature
from vilmedic.config.tree import MOST_PROBLEMS, KeyPath, Mark, Tree, dotted, guard, resolve
from vilmedic.config.types import (
    ANY,
    Calls,
    MapOf,
    Marked,
    NameIn,
    Type,
    instance_of,
    options,
    wrong_folder_name,
)
from vilmedic.config.wording import shown
from vilmedic.config.yaml_source import Override, parse_override, read_file, to_yaml
from vilmedic.errors import ArgumentError, ConfigError
from vilmedic.registry import Registry, import_class, import_plugins

C = TypeVar("C")
ROOT = f"{RunSection.__module__}.{RunSection.__name__}"


class Node(dict[str, Any]):
    """A mapping of a configuration with its path and origin.

    Args:
        data: the keys and values.
        path: the path of the mapping.
        tree: the configuration that contains it, for the origins of its keys.
        plans: the plans of the checked nodes of the configuration; a new one is added.
    """

    def __init__(
        self, data: dict[str, Any], path: KeyPath, tree: Tree, plans: dict[KeyPath, Plan]
    ) -> None:
        super().__init__(data)
        self.path, self.tree, self.plans = path, tree, plans

    def plan(self, registry: Registry) -> Plan:
        """Return the plan of the node, checking it if it is new or changed.

        Raises:
            ConfigError: the node does not fit the signatures.
        """
        known = self.plans.get(self.path)
        if known is not None and plain_data(known) == dict(self):
            return known
        checker = Checker(self.tree)
        kind = Marked(MapOf(ANY), NameIn(registry.kind))
        made: Plan = checker.value(kind, dict(self), self.path)
        if checker.problems:
            raise ConfigError(checker.problems)
        self.plans |= checker.plans
        return made


@dataclass(frozen=True)
class Config:
    """A checked configuration.

    Args:
        run: all of it, typed.
        data: all of it as plain values; the framework's own sections hold their defaults.
        tree: the values that were given, with their marks.
        overrides: the words of the command line.
        notes: one line per choice of the command line that made keys of files meaningless.
        path: the configuration file.
        plans: the plans of its nodes, so that none is checked twice.
        file_notes: one line per choice of a file that made keys of its includes meaningless; these
            are intended, so a run does not repeat them.
    """

    run: RunSection
    data: dict[str, Any]
    tree: Tree
    overrides: tuple[str, ...]
    notes: tuple[str, ...]
    path: str
    plans: dict[KeyPath, Plan] = field(default_factory=dict, compare=False, repr=False)
    file_notes: tuple[str, ...] = ()

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
        return Node(self.run.dataset, ("dataset",), self.tree, self.plans)

    @property
    def model(self) -> Node:
        """The node of the model, for `build(MODELS, ...)`."""
        return Node(self.run.model, ("model",), self.tree, self.plans)

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

    def calls(self, section: str, key: str) -> list[Node]:
        """Names with options as nodes for `build_calls`: `calls("validator", "metrics")`."""
        path, given = (section, key), getattr(getattr(self, section), key)
        if self.tree.has(path) and isinstance(self.tree.get(path), dict):
            given = dict(entries(given))
        return list(_nodes(given, path, self.tree, self.plans))

    @property
    def origins(self) -> dict[str, str]:
        """Dotted key to `file:line` or `command line`, for every value that was given."""
        return {".".join(map(str, path)): mark.origin for path, mark in self.tree.marks.items()}

    def settle(self, section: str, key: str, value: Any) -> None:
        """Replace a value that was left to the machine by the value chosen."""
        setattr(getattr(self.run, section), key, value)
        self.data[section][key] = value

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML; reading it gives the same configuration."""
        return to_yaml(self.data)


@dataclass(frozen=True)
class Draft:
    """A configuration that is read but not checked.

    Args:
        tree: the resolved values.
        problems: problems so far.
        notes: see `Config`.
        file_notes: see `Config`.
    """

    tree: Tree
    problems: list[str]
    notes: list[str]
    file_notes: list[str]


def load(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, training: bool = False
) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: the YAML file.
        overrides: words as on the command line, `key=value` and `~key`.
        training: whether it is for training: refuses settings that only an evaluation accepts.

    Returns:
        The configuration.

    Raises:
        ConfigError: lists all problems.
    """
    draft = read(os.fspath(path), overrides)
    root = root_signature()
    tree = draft.tree
    checker = Checker(tree, cache(lambda: schema_keys(root, tree.data)))
    checked = plain_data(checker.section(root, tree.data, ()))
    problems = [*draft.problems, *checker.problems, *wrong_optimizer(tree, checked)]
    problems += [*wrong_groups(tree, checked), *wrong_warmup(tree, checked)]
    if not problems:
        problems += [*wrong_score(tree, checked), *misfits(tree, checked, training=training)]
    if problems:
        raise ConfigError(problems)
    checked["name"] = checked.get("name") or Path(path).stem
    wrong = wrong_folder_name(checked["name"])
    if wrong:
        raise ConfigError(f"name: given {shown(checked['name'])}, that of the file; {wrong}")
    sections = {"trainor": TrainorSection, "validator": ValidatorSection}
    for key, cls in {**sections, "ensemblor": EnsemblorSection}.items():
        checked[key] = cls(**checked.get(key) or {})
    run = RunSection(**checked)
    notes = (*draft.notes, *checker.notes)
    words = tuple(overrides)
    return Config(
        run,
        asdict(run),
        tree,
        words,
        notes,
        os.fspath(path),
        checker.plans,
        tuple(draft.file_notes),
    )


def read(path: str, words: Iterable[str] = ()) -> Draft:
    """Read and merge a configuration without checking its values.

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
    replaced: list[str] = []
    for layer in layers[1:]:
        replaced += drop_replaced(tree, layer, root, defaults)
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
    return Draft(tree, problems + broken, notes, replaced)


def default_values(path: str) -> dict[str, Any]:
    """Return the defaults of the framework's own keys."""
    values = asdict(RunSection(name=Path(path).stem, dataset={}, model={}))
    return {key: value for key, value in values.items() if key not in ("dataset", "model")}


def root_signature() -> Signature:
    """The signature of the whole configuration."""
    root = read_signature(ROOT)
    if root is None or instance_of(root.params["trainor"].type) is None:
        raise RuntimeError(f"the source text of {ROOT} cannot be read")
    return root


def _start_from_defaults(tree: Tree, overrides: list[Override], defaults: dict[str, Any]) -> None:
    """Add the default of a section of names to the files if a word sets a key inside it.

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


# -- objects


def build(registry: Registry, node: dict[str, Any], **runtime: Any) -> Any:
    """Build the object of a node, nested nodes first.

    Args:
        registry: where `proto` is looked up.
        node: `proto` and the arguments; arguments that are missing keep the defaults of the code.
        runtime: runtime arguments: each value is passed to every constructor, including nested
            ones, that has a `Runtime` argument of that name.

    Returns:
        The object.

    Raises:
        ConfigError: the node does not fit the signatures, or a constructor refuses a value.
        TypeError: the framework gives nothing of that name to classes of this kind.
    """
    if unknown := [name for name in runtime if name not in registry.runtime]:
        allowed = ", ".join(registry.runtime) or "nothing"
        raise TypeError(f"build gives {allowed} to a {registry.kind}, not {', '.join(unknown)}")
    if not isinstance(node, Node):
        node = Node(node, (registry.kind,), Tree(), {})
    return _make(node.plan(registry), node.tree, runtime)


def fetch(registry: Registry, node: Node) -> None:
    """Download the files that the constructors of a node need, before slow steps.

    A class that downloads has a static method `fetch`, which gets the given arguments of its
    constructor.

    Args:
        registry: where `proto` is looked up.
        node: `proto` and the arguments, as for `build`.

    Raises:
        ConfigError: a file is not available.
    """
    ask(registry, node, "fetch")


def ask(registry: Registry, node: Node, method: str) -> list[Any]:
    """Call the static methods of a name with the constructor arguments of a node.

    Args:
        registry: where `proto` is looked up.
        node: `proto` and the arguments, as for `build`.
        method: the name; classes without such a method give nothing.

    Raises:
        ConfigError: a method refuses an argument.
    """
    found = []
    for plan in _plans(node.plan(registry)):
        asked = getattr(_class_of(plan.found, plan.path), method, None)
        if asked is None:
            continue
        try:
            found.append(asked(**plan.arguments))
        except ArgumentError as error:
            raise located(error, node.tree, plan.path) from error
    return found


def _plans(checked: Any) -> Iterator[Plan]:
    """The nodes in a checked value."""
    if isinstance(checked, Plan):
        yield checked
        checked = checked.arguments
    values = checked.values() if isinstance(checked, dict) else checked
    for one in values if isinstance(checked, dict | list) else ():
        yield from _plans(one)


def build_calls(
    registry: Registry, calls: Any, where: str = "", **runtime: Any
) -> list[tuple[str, Any]]:
    """Build the objects of a mapping or list of names with options.

    Args:
        registry: where the names are looked up.
        calls: `{zero_shot: {prompts: p.yml}, retrieval: }`, or a list of such entries, of names and
            of the nodes that `Config.calls` gives.
        where: the dotted key of entries that are not nodes, for messages.
        runtime: as for `build`.

    Returns:
        Name and object, in order.
    """
    nodes = nodes_of(calls, where or registry.kind)
    return [(node["proto"], build(registry, node, **runtime)) for node in nodes]


def nodes_of(calls: Any, where: str) -> list[Node]:
    """Return the nodes of names with options, for `build_calls`.

    Args:
        calls: the names with options.
        where: the dotted key of what is no node, for messages.
    """
    return list(_nodes(calls, tuple(where.split(".")), Tree(), {}))


def read_as(cls: type[C], path: str | os.PathLike[str]) -> tuple[C, Tree]:
    """Build an object of a class from a separate YAML file, checked like a configuration.

    Args:
        cls: a class of this package; its arguments are the keys of the file.
        path: the YAML file.

    Returns:
        The object, and the values of the file with the line of each.

    Raises:
        ConfigError: the file cannot be read, or does not fit the signature.
    """
    tree = read_file(os.fspath(path))
    return cls(**_make(_check(cls, tree), tree, {})), tree


def check_arguments(cls: type, given: dict[str, Any]) -> None:
    """Refuse arguments that the signature of a class does not allow.

    Args:
        cls: a class of this package that configurations build.
        given: its arguments, as a caller from Python gives them.

    Raises:
        ConfigError: a value is not allowed.
    """
    _check(cls, Tree(dict(given)))


def _check(cls: type, tree: Tree) -> dict[str, Any]:
    """The checked arguments of a class.

    Raises:
        ConfigError: they do not fit its signature.
    """
    read = read_signature(f"{cls.__module__}.{cls.__qualname__}")
    assert read is not None
    checker = Checker(tree)
    arguments = checker.section(read, tree.data, ())
    if checker.problems:
        raise ConfigError(checker.problems)
    return arguments


def _nodes(calls: Any, path: KeyPath, tree: Tree, plans: dict[KeyPath, Plan]) -> Iterator[Node]:
    """Return names with options as nodes, each with its path."""
    if isinstance(calls, dict):
        for name, given in calls.items():
            yield Node({"proto": name, **(given or {})}, (*path, name), tree, plans)
        return
    for index, entry in enumerate(calls or ()):
        where = (*path, index)
        if isinstance(entry, Node):
            yield entry
        elif isinstance(entry, str):
            yield Node({"proto": entry}, where, tree, plans)
        else:
            yield from _nodes(entry, where, tree, plans)


def _make(checked: Any, tree: Tree, runtime: dict[str, Any]) -> Any:
    """Build the object of a checked value."""
    if isinstance(checked, dict):
        return {key: _make(one, tree, runtime) for key, one in checked.items()}
    if isinstance(checked, list):
        return [_make(one, tree, runtime) for one in checked]
    if isinstance(checked, Items):
        return checked.container(_make(checked.values, tree, runtime))
    if not isinstance(checked, Plan):
        return Path(checked) if isinstance(checked, PathText) else checked
    found = checked.found
    given = {key: one for key, one in checked.arguments.items() if key not in found.consumed}
    arguments = _make(given, tree, runtime)
    for name, param in found.signature.params.items() if found.signature else ():
        if param.runtime and name in runtime:
            arguments[name] = runtime[name]
    cls = _class_of(found, checked.path)
    try:
        return cls(**arguments)
    except ArgumentError as error:
        raise located(error, tree, checked.path) from error
    except (ValueError, TypeError) as error:
        where = tree.where(checked.path)
        raise ConfigError(f"{where}: {cls.__name__} refuses it: {error}") from error


def located(error: ArgumentError, tree: Tree, path: KeyPath) -> ConfigError:
    """Return the problems of arguments, each with its place in the configuration.

    Args:
        error: the error of the object at `path`.
        tree: the configuration.
        path: the path of the object.
    """
    return ConfigError(
        f"{tree.where((*path, *(name.split('.') if name else ())))}: {text}"
        for name, text in error.arguments.items()
    )


def _class_of(found: Target, path: KeyPath) -> Any:
    if found.registry is not None and found.name is not None:
        return found.registry.get(found.name)
    cls = find_class(found.path)
    if cls is None:
        raise ConfigError(f"{dotted(path)}: there is no class {found.path}.")
    module = cls.module.path
    return import_class(f"{module}:{found.path[len(module) + 1 :]}", f"'{dotted(path)}'")
