"""Validation of configuration values against the signatures of the classes they build."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vilmedic.config.keys import check_older, find_older, idle_keys
from vilmedic.config.namespaces import Target, named_target, names, registry_of, signature, target
from vilmedic.config.signature import Param, Signature
from vilmedic.config.transformers_fields import config_signature, field_bounds, model_type_of
from vilmedic.config.tree import BROKEN, MOST_PROBLEMS, KeyPath, Tree, dotted
from vilmedic.config.types import (
    ANY,
    BOUNDS,
    LARGEST,
    NUMBERS,
    UNFIT,
    AnyOf,
    AsLongAs,
    Basic,
    Calls,
    ConfigOf,
    FolderName,
    Instance,
    Lengths,
    ListOf,
    MapOf,
    Marked,
    Matching,
    NameIn,
    OptionsOf,
    TupleOf,
    Type,
    instance_of,
    is_number,
    largest_in,
    options,
    plain,
    read_scalar,
    wrong_folder_name,
)
from vilmedic.config.wording import allowed, mismatch, shown, unknown_key
from vilmedic.errors import ConfigError, nearest
from vilmedic.registry import REGISTRIES, Registry

_CONTAINERS: dict[str, type] = {"tuple": tuple, "set": set}


@dataclass(frozen=True)
class Plan:
    """A checked node: its class and arguments.

    Args:
        found: the class.
        arguments: the checked keys of the node, including those that choose the class.
        path: the path of the node.
        implied: whether it is not given and only has the defaults of the class.
    """

    found: Target
    arguments: dict[str, Any]
    path: KeyPath
    implied: bool = False


@dataclass(frozen=True)
class Items:
    """A checked list that a constructor gets as a tuple or a set."""

    container: type
    values: list[Any]


class PathText(str):
    """Checked text that a constructor gets as a path."""


def plain_data(checked: Any) -> Any:
    """Return a checked value as plain data, as in a configuration file."""
    if isinstance(checked, Plan):
        checked = {
            key: one
            for key, one in checked.arguments.items()
            if not (isinstance(one, Plan) and one.implied)
        }
    if isinstance(checked, dict):
        return {key: plain_data(one) for key, one in checked.items()}
    if isinstance(checked, list | Items):
        return [
            plain_data(one) for one in (checked if isinstance(checked, list) else checked.values)
        ]
    return str(checked) if isinstance(checked, PathText) else checked


class Checker:
    """Collects every problem of a tree of values, and plans the objects to build.

    Args:
        tree: the values and their marks, interpolations resolved.
        elsewhere: returns all dotted keys of the resolved schema, for hints.

    Attributes:
        problems: one complete text per problem.
        notes: one line per key that was left out.
        plans: the plan of each valid node, by its path.
        within: the registry of the outermost object that is being checked; None outside of any.
    """

    def __init__(self, tree: Tree, elsewhere: Callable[[], list[str]] = list) -> None:
        self.tree = tree
        self.elsewhere = elsewhere
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.plans: dict[KeyPath, Plan] = {}
        self.trying = False
        self.within: Registry | None = None

    @property
    def full(self) -> bool:
        """Whether there are so many problems that no more are reported."""
        return len(self.problems) >= MOST_PROBLEMS

    def report(self, path: KeyPath, text: str) -> None:
        """Record a problem of the value at a path, up to a maximum."""
        if self.full:
            if len(self.problems) == MOST_PROBLEMS:
                self.problems.append(f"there are more problems than these {MOST_PROBLEMS}.")
            return
        note = self.tree.mark(path).note
        self.problems.append(f"{self.tree.where(path)}: {text}{f' ({note})' if note else ''}")

    # -- mappings whose keys are arguments

    def section(
        self,
        read: Signature,
        given: dict[str, Any],
        path: KeyPath,
        *,
        consumed: frozenset[str] | set[str] = frozenset(),
        filled: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Check the keys of a mapping as the arguments of a class.

        Args:
            read: the signature of the class.
            given: the mapping.
            path: its path.
            consumed: keys that are already handled.
            filled: required arguments that may be missing.

        Returns:
            The arguments, each with its value in the type of the signature.
        """
        result: dict[str, Any] = {}
        settable = read.settable
        self.given_by_framework(read, path)
        self.idle(read, given, path)
        extras, open_ended = self.extras(read, given)
        for key, value in list(given.items()):
            where = (*path, key)
            if key in consumed:
                result[key] = value
            elif value is BROKEN or self.older(read, where, value, given, open_ended):
                continue
            elif key in settable:
                result[key] = self.value(settable[key].type, value, where, read, given)
            elif key in extras:
                result[key] = self.value(extras[key].type, value, where, read, given)
            elif key in read.params:
                self.report(where, "is given by the framework, not by the configuration.")
            elif open_ended:
                result[key] = value
            else:
                if self.full:
                    self.report(where, "unknown key")
                    break
                known = [*settable, *(["proto"] if "proto" in consumed else []), *extras]
                self.report(where, unknown_key(where, value, known, self.elsewhere()))
        for name, param in settable.items():
            if param.required and name not in given and name not in filled:
                self.missing(param, path, result)
        return result

    def given_by_framework(self, read: Signature, path: KeyPath) -> None:
        """Refuse a class with runtime arguments that the framework does not give."""
        if self.within is None:
            return
        names, kind = self.within.runtime, self.within.kind
        for param in read.params.values():
            if param.runtime and param.name not in names:
                self.report(
                    path,
                    f"{read.path} has the argument '{param.name}: Runtime[...]', which the "
                    f"framework does not give to what it builds of a {kind}. Allowed: "
                    f"{', '.join(names) or 'none'}.{nearest(param.name, names)}",
                )

    def idle(self, read: Signature, given: dict[str, Any], path: KeyPath) -> None:
        """Refuse keys of a section that have no effect, or remove them."""
        for one in [] if self.trying else list(idle_keys(self.tree, read, given, path)):
            if not one.dropped:
                self.report(one.path, one.why)
                continue
            self.leave_out(one.path, given, len(path), f"it {one.why}")

    def older(
        self, read: Signature, path: KeyPath, value: Any, given: dict[str, Any], open_ended: bool
    ) -> bool:
        """Handle a key of published configurations that the schema does not have."""
        key = str(path[-1])
        known = key in read.params or key in self.extras(read, given)[0]
        found = None if known else find_older(path, open_ended=open_ended)
        if found is None:
            return False
        accepted, text = check_older(found, value, path)
        if not accepted:
            quoted = textwrap.shorten(shown(value), 60, placeholder=" ...")
            self.report(path, f"given {quoted}; {text}.")
        elif not self.trying:
            self.leave_out(path, given, len(path) - 1, text)
        return True

    def leave_out(self, path: KeyPath, given: dict[str, Any], depth: int, why: str) -> None:
        """Remove a key from a section, `depth` keys deep, with a note."""
        self.notes.append(f"{self.tree.where(path)} is left out: {why}.")
        Tree(given).remove(path[depth:])
        if self.tree.has(path):
            self.tree.remove(path)
        self.tree.forget(path)

    def extras(self, read: Signature, given: dict[str, Any]) -> tuple[dict[str, Param], bool]:
        """Return the keys that `**settings` may hold, and whether others are allowed too."""
        if read.extras is None:
            return {}, False
        if not (isinstance(read.extras, Marked) and isinstance(read.extras.mark, ConfigOf)):
            return {}, True
        defaults = {param.name: param.default for param in read.params.values()}
        model_type = model_type_of(read.extras.mark, {**defaults, **given})
        fields = None if model_type is None else config_signature(model_type)
        return ({}, True) if fields is None else (fields.params, False)

    def missing(self, param: Param, path: KeyPath, result: dict[str, Any]) -> None:
        """Report a missing required argument."""
        where = (*path, param.name)
        if instance_of(param.type) is not None:
            trial = self.trial()
            implied = trial.value(param.type, {}, where)
            if not trial.problems:
                result[param.name] = replace(implied, implied=True)
                return
        origin = self.tree.origin(path)
        under = f" under '{dotted(path)}'" if path else " at the top level"
        place = f" ({origin})" if origin else ""
        self.problems.append(
            f"{dotted(where)}: missing{under}{place}; allowed: {allowed(param.type)}."
        )

    # -- values

    def value(
        self,
        kind: Type,
        given: Any,
        path: KeyPath,
        read: Signature | None = None,
        siblings: dict[str, Any] | None = None,
    ) -> Any:
        """Check one value.

        Args:
            kind: its type.
            given: the value.
            path: its path.
            read: the signature that it belongs to.
            siblings: the mapping that contains it.

        Returns:
            The value converted to its type; after a problem, anything.
        """
        if given is BROKEN:
            return None
        if registry_of(kind) is not None or isinstance(kind, Instance):
            return self.node(kind, given, path)
        if isinstance(kind, Marked):
            return self.marked(kind, given, path, read, siblings)
        if isinstance(kind, AnyOf):
            return self.any_of(kind, given, path, read, siblings)
        if isinstance(kind, ListOf | TupleOf) and isinstance(given, list):
            return self.items(kind, given, path)
        if isinstance(kind, MapOf) and isinstance(given, dict):
            return {key: self.value(kind.value, one, (*path, key)) for key, one in given.items()}
        result = read_scalar(kind, given, self.tree.mark(path).raw)
        if result is UNFIT:
            self.report(path, mismatch(kind, given))
            return None
        return PathText(result) if kind == Basic("path") else result

    def items(self, kind: ListOf | TupleOf, given: list[Any], path: KeyPath) -> Any:
        """Check a list."""
        if isinstance(kind, TupleOf) and len(kind.items) != len(given):
            self.report(path, mismatch(kind, given))
            return None
        types_of = kind.items if isinstance(kind, TupleOf) else [kind.item] * len(given)
        values = [
            self.value(one, item, (*path, index))
            for index, (one, item) in enumerate(zip(types_of, given, strict=True))
        ]
        container = "tuple" if isinstance(kind, TupleOf) else kind.container
        return values if container == "list" else Items(_CONTAINERS[container], values)

    def any_of(
        self,
        kind: AnyOf,
        given: Any,
        path: KeyPath,
        read: Signature | None,
        siblings: dict[str, Any] | None,
    ) -> Any:
        """Check a value against the first alternative that it fits, text last."""
        known = [one for one in options(kind) if one != Basic("foreign")]
        if all(one == Basic("null") for one in known):
            return self.value(ANY, given, path)
        texts = (Basic("text"), Basic("path"), ANY)
        # an integer stays an integer if both kinds are allowed
        ordered = sorted(known, key=lambda one: (plain(one) in texts, plain(one) == Basic("float")))
        for option in ordered:
            trial = self.trial()
            trial.value(option, given, path, read, siblings)
            if not trial.problems:
                return self.value(option, given, path, read, siblings)
        fitting = [option for option in ordered if self.fits(option, given)]
        if len(fitting) == 1 and not is_number(given):
            # a problem inside the value is more informative than "nothing fits"
            return self.value(fitting[0], given, path, read, siblings)
        self.report(path, mismatch(kind, given))
        return None

    def trial(self) -> Checker:
        """Return a checker of the same tree for trials, whose problems are discarded."""
        trial = Checker(self.tree)
        trial.trying = True
        trial.within = self.within
        return trial

    @contextmanager
    def inside(self, registry: Registry | None) -> Iterator[None]:
        """Context of one object of a registry, which sets the runtime arguments.

        Args:
            registry: the registry of the object; that of an enclosing object takes precedence.
        """
        outer = self.within
        self.within = outer or registry
        try:
            yield
        finally:
            self.within = outer

    @staticmethod
    def fits(option: Type, given: Any) -> bool:
        """Return whether a value has the outer form of an alternative, ignoring its contents."""
        if isinstance(option, Marked) and isinstance(option.mark, Calls):
            return isinstance(given, dict | list)
        base = plain(option)
        if isinstance(given, dict):
            return isinstance(base, MapOf | Instance)
        if isinstance(given, list):
            return isinstance(base, ListOf | TupleOf)
        if isinstance(given, str):
            return isinstance(option, Marked) and base == Basic("text")
        return isinstance(option, Marked) and is_number(given) and base in NUMBERS

    # -- marks

    def marked(
        self,
        kind: Marked,
        given: Any,
        path: KeyPath,
        read: Signature | None,
        siblings: dict[str, Any] | None,
    ) -> Any:
        """Check a value by its type and by its mark."""
        mark = kind.mark
        if given is None and isinstance(mark, Calls | OptionsOf):
            given = _empty(kind)
        if isinstance(mark, Calls) and isinstance(given, dict | list):
            calls = self.calls(mark, given, path)
            if isinstance(calls, dict) and not _is_map(kind):
                return [{name: one} for name, one in calls.items()]
            return calls
        if isinstance(mark, (*BOUNDS, Matching, FolderName)):
            trial = self.trial()
            trial.value(kind.base, given, path)
            if trial.problems:
                self.report(path, mismatch(kind, given))
                return None
        before = len(self.problems)
        value = self.value(kind.base, given, path, read, siblings)
        if len(self.problems) > before or given is None:
            return value
        if isinstance(mark, BOUNDS):
            if is_number(given) and not mark.allows(given):
                self.report(path, mismatch(kind, given))
        elif isinstance(mark, Lengths):
            if len(given) not in mark.allowed:
                self.report(path, mismatch(kind, given))
        elif isinstance(mark, AsLongAs):
            default = read.params[mark.key].default if read and mark.key in read.params else None
            other = (siblings or {}).get(mark.key, default)
            if isinstance(other, list | tuple) and len(other) != len(given):
                self.report(
                    path,
                    f"given {shown(given)}; allowed: as many entries as "
                    f"{dotted((*path[:-1], mark.key))} has, {len(other)}.",
                )
        elif isinstance(mark, FolderName):
            problem = wrong_folder_name(str(value))
            if problem:
                self.report(path, f"given {shown(value)}; {problem}")
        elif isinstance(mark, Matching):
            if not re.fullmatch(mark.pattern, str(value)):
                self.report(path, mismatch(kind, given))
        elif isinstance(mark, NameIn) and isinstance(value, str):
            try:
                signature(mark.namespace, value)
            except ConfigError as error:
                self.report(path, f"given {shown(given)}; {error}")
        elif isinstance(mark, OptionsOf) and isinstance(value, dict):
            return self.chosen_options(mark, value, path, read, siblings or {})
        elif isinstance(mark, ConfigOf) and isinstance(value, dict):
            return self.fields_of(mark, value, path, siblings or {})
        return value

    def fields_of(
        self, mark: ConfigOf, given: dict[str, Any], path: KeyPath, siblings: dict[str, Any]
    ) -> dict[str, Any]:
        """Check fields of a transformers configuration class, if the class is known."""
        model_type = model_type_of(mark, siblings)
        fields = None if model_type is None else config_signature(model_type)
        if fields is None:
            for name, one in given.items():
                kind: Type = ANY
                for bound in field_bounds(name):
                    kind = Marked(kind, bound)
                if largest_in(one) > LARGEST:
                    self.report((*path, name), f"given {shown(one)}; it has to fit into 64 bits.")
                else:
                    self.value(kind, one, (*path, name))
            return given
        for name in given.keys() - fields.params.keys():
            self.report(
                (*path, name),
                f"is not a setting of {fields.path.rpartition('.')[2]}."
                f"{nearest(name, list(fields.params))}",
            )
        return {
            name: self.value(fields.params[name].type, one, (*path, name))
            for name, one in given.items()
            if name in fields.params
        }

    # -- names with options

    def calls(self, mark: Calls, given: Any, path: KeyPath) -> Any:
        """Check a mapping, or a list, of names with options."""
        if isinstance(given, dict):
            return {name: self.call(mark, name, one, (*path, name)) for name, one in given.items()}
        result: list[Any] = []
        for index, entry in enumerate(given):
            where = (*path, index)
            if isinstance(entry, str):
                self.call(mark, entry, None, where)
                result.append(entry)
            elif isinstance(entry, dict) and len(entry) == 1:
                ((name, one),) = entry.items()
                result.append({name: self.call(mark, name, one, (*where, name))})
            elif entry is not BROKEN:
                self.report(
                    where,
                    f"given {shown(entry)}; allowed: a name, or one name with its options, of: "
                    f"{', '.join(names(mark.namespace))}.",
                )
        return result

    def call(self, mark: Calls, name: str, given: Any, path: KeyPath) -> dict[str, Any] | None:
        """Check the options of one name."""
        if given is BROKEN or self.full:
            return None
        try:
            read = signature(mark.namespace, name)
        except ConfigError as error:
            self.report(path, str(error))
            return None
        given = {} if given is None else given
        if not isinstance(given, dict):
            known = ", ".join(read.settable) if read and read.settable else "its options"
            self.report(path, f"given {shown(given)}; allowed: mapping with {known}.")
            return None
        before = len(self.problems)
        with self.inside(REGISTRIES.get(mark.namespace)):
            checked = given if read is None else self.section(read, given, path)
        if mark.namespace in REGISTRIES and len(self.problems) == before:
            # a name with its options is a node without proto
            found = named_target(REGISTRIES[mark.namespace], {"proto": name})
            self.plans[path] = Plan(found, {"proto": name, **checked}, path)
        return checked

    def chosen_options(
        self,
        mark: OptionsOf,
        given: dict[str, Any],
        path: KeyPath,
        read: Signature | None,
        siblings: dict[str, Any],
    ) -> dict[str, Any]:
        """Check the options of the class that a sibling key names."""
        default = read.params[mark.key].default if read and mark.key in read.params else None
        name = siblings.get(mark.key, default)
        if name is BROKEN:
            return given
        if name is None:
            sibling = dotted((*path[:-1], mark.key))
            for key, value in given.items():
                self.report(
                    (*path, key),
                    f"given {shown(value)}; no option is allowed while '{sibling}' is null.",
                )
            return given
        try:
            of = signature(mark.namespace, str(name))
        except ConfigError:
            # the name is reported at its own key
            return given
        return given if of is None else self.section(of, given, path, filled=mark.filled)

    # -- nodes

    def node(self, kind: Type, given: Any, path: KeyPath) -> Any:
        """Check a mapping that is built into an object."""
        if given is None:
            given = {}
        if not isinstance(given, dict):
            self.report(path, mismatch(kind, given))
            return None
        if given.get("proto") is BROKEN:
            return given
        try:
            found = target(kind, given)
        except ConfigError as error:
            self.report((*path, "proto"), str(error))
            return given
        before = len(self.problems)
        arguments = dict(given)
        if found.signature is not None:
            with self.inside(found.registry):
                arguments = self.section(found.signature, given, path, consumed=found.consumed)
        if len(self.problems) > before:
            return arguments
        self.plans[path] = Plan(found, arguments, path)
        return self.plans[path]


def _is_map(kind: Marked) -> bool:
    return any(isinstance(plain(one), MapOf) for one in options(plain(kind)))


def _empty(kind: Marked) -> Any:
    """Return the meaning of null in a section of names or options: an empty section, or null."""
    empty: dict[type[Type], Any] = {MapOf: {}, ListOf: []}
    return empty.get(type(plain(kind)))
