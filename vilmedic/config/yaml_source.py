"""YAML text to plain values, with the line and the spelling of each.

Only plain data can come out: numbers, truth values, null, text, lists and mappings. Unlike in
YAML 1.1, `5e-5` is a number, `no` and `on` are text and `00123` is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from vilmedic.config.marks import KeyPath, Mark, Tree
from vilmedic.errors import ConfigError

_PREFIX = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_CONVERTERS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
}


class PlainLoader(yaml.SafeLoader):
    """Composes YAML; plain scalars are resolved by the rules of this module."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class PlainDumper(yaml.SafeDumper):
    """Writes YAML that `PlainLoader` reads back to the same values."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Repeated values are written out."""
        return True


for _name, _pattern, _first in _RESOLVERS:
    for _class in (PlainLoader, PlainDumper):
        _class.add_implicit_resolver(_PREFIX + _name, re.compile(f"(?:{_pattern})$"), _first)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\n" in text else None
    return dumper.represent_scalar(_PREFIX + "str", text.replace("${", "\\${"), style=style)


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    flow = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence(_PREFIX + "seq", values, flow_style=flow)


PlainDumper.add_representer(str, _represent_text)
PlainDumper.add_representer(list, _represent_list)


def read_yaml(text: str, origin: Callable[[int], str]) -> tuple[Any, dict[KeyPath, Mark]]:
    """Read one YAML document.

    Args:
        text: the document.
        origin: from a line number (the first is 1) to the origin that messages show.

    Returns:
        The value, and the mark of everything in it by path; its own mark is at `()`.

    Raises:
        ConfigError: the text is not YAML, holds a key twice or asks for an object.
    """
    loader = PlainLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        column = f":{mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "unreadable"
        remedy = " Indent with spaces, not with tabs." if r"'\t'" in problem else ""
        where = origin(mark.line + 1 if mark else 1)
        raise ConfigError(f"{where}{column}: not valid YAML: {problem}.{remedy}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin(1)}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    reader = _Reader(origin)
    if node is None:
        return None, {}
    return reader.value(node, ()), reader.marks


def read_file_text(path: str) -> str:
    """The text of a configuration file; a byte order mark is left out."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}).") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None


def read_file(path: str) -> Tree:
    """The top-level mapping of a configuration file.

    Raises:
        ConfigError: not readable, not YAML, empty, or no mapping.
    """
    data, marks = read_yaml(read_file_text(path), lambda line: f"{path}:{line}")
    if data is None:
        raise ConfigError(f"{path}: the file is empty. Allowed: a mapping of keys to values.")
    if not isinstance(data, dict):
        given = "a list" if isinstance(data, list) else repr(data)
        raise ConfigError(
            f"{marks[()].origin}: the file holds {given}. Allowed: a mapping of keys to values."
        )
    marks.pop((), None)
    return Tree(data, marks)


class _Reader:
    """Turns composed nodes into values and notes where each one stands."""

    def __init__(self, origin: Callable[[int], str]) -> None:
        self.origin = origin
        self.marks: dict[KeyPath, Mark] = {}
        self.open: list[yaml.Node] = []

    def where(self, node: yaml.Node) -> str:
        return self.origin(node.start_mark.line + 1)

    def value(self, node: yaml.Node, path: KeyPath, where: str | None = None) -> Any:
        if any(node is other for other in self.open):
            raise ConfigError(f"{self.where(node)}: the anchor contains itself.")
        origin = where or self.where(node)
        self.marks[path] = Mark(origin)
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        finally:
            self.open.pop()
        kind = node.tag.removeprefix(_PREFIX)
        if not isinstance(node, yaml.ScalarNode) or kind not in _CONVERTERS:
            raise ConfigError(f"{origin}: the tag '{node.tag}' is not allowed in a configuration.")
        try:
            value = _CONVERTERS[kind](node.value)
        except ValueError:
            raise ConfigError(f"{origin}: '{node.value}' is not of type {kind}.") from None
        if kind != "str" and node.style is None:
            self.marks[path] = Mark(origin, raw=node.value)
        return value

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.where(key_node)}: a key has to be plain text.")
            key = key_node.value
            if key == "<<" and key_node.style is None:
                continue
            if key in lines:
                name = ".".join(str(part) for part in (*path, key))
                raise ConfigError(
                    f"{self.where(key_node)}: the key '{name}' is given twice, "
                    f"first at {lines[key]}."
                )
            lines[key] = self.where(key_node)
        for merged in self.merged(node):
            # a later mapping of a merge list, and every own key, wins
            result.update(self.mapping(merged, path))
        for key_node, value_node in node.value:
            if key_node.value in lines:
                result[key_node.value] = self.value(
                    value_node, (*path, key_node.value), lines[key_node.value]
                )
        return result

    def merged(self, node: yaml.MappingNode) -> list[yaml.MappingNode]:
        """The mappings that `<<` merges into a mapping, the weakest first."""
        found: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.value == "<<" and key_node.style is None:
                many = isinstance(value_node, yaml.SequenceNode)
                found += reversed(value_node.value) if many else [value_node]
        for other in found:
            if not isinstance(other, yaml.MappingNode) or any(other is one for one in self.open):
                raise ConfigError(f"{self.where(other)}: '<<' takes an anchored mapping.")
        return [other for other in found if isinstance(other, yaml.MappingNode)]
