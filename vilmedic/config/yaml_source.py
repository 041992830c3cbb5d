"""Parsing of YAML text and command-line words, with the source location of each value.

Only plain data can come out: numbers, truth values, null, text, lists and mappings. Unlike in
YAML 1.1, `5e-5` is a number, `no` and `on` are text and `00123` is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import yaml

from vilmedic.config.tree import COMMAND_LINE, KeyPath, Mark, Tree
from vilmedic.errors import ConfigError, visible
from vilmedic.files import open_regular

_NULL = ("", "~", "null", "Null", "NULL")
_SYNTAX = "Allowed: key=value, with dots between nested keys, or ~key to remove one."
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
# control characters except tab and line breaks, lone surrogates, and ends of Unicode planes
_UNUSABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_CONVERTERS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
}


MOST_BYTES = 1_000_000
MOST_NODES = 100_000
DEEPEST = 64

# libyaml reads six times as fast; without it the same is done in Python
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PlainLoader(_Base):
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
        origin: returns the origin shown in messages for a line number from 1.

    Returns:
        The value, and the marks of everything in it by path; its own mark is at `()`.

    Raises:
        ConfigError: the text is not YAML, holds a key twice, asks for an object, or is larger or
            deeper than any configuration.
    """
    node = compose(text, origin)
    reader = _Reader(origin)
    if node is None:
        return None, {}
    return reader.value(node, ()), reader.marks


def compose(text: str, origin: Callable[[int], str]) -> yaml.Node | None:
    """Compose one YAML document, with a limit on its size.

    Args:
        text: the document.
        origin: as for `read_yaml`.

    Returns:
        The node; None when there is nothing in the text.

    Raises:
        ConfigError: the text is not YAML, or larger or deeper than any configuration.
    """
    check_characters(text, origin)
    try:
        _check_size(text, origin)
        node = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark is not None else (0, 0)
        problem = error.problem or error.context or "unreadable"
        here = "".join(text.splitlines()[line : line + 1])
        remedy = " Indent with spaces, not with tabs." if here[column : column + 1] == "\t" else ""
        where = f"{origin(line + 1)}:{column + 1}"
        raise ConfigError(f"{where}: not valid YAML: {problem}.{remedy}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{origin(1)}: not valid YAML: {problem}.") from None
    # without references nothing counts twice, and everything is already counted
    if node is not None and "*" in text and _expanded(node, {}) > MOST_NODES:
        raise _too_large(origin(1), deep=False)
    return node


def _compose(text: str) -> Any:
    loader = PlainLoader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values in a node; referenced values count each time."""
    if id(node) not in known:
        known[id(node)] = 0  # an anchor that contains itself is found when it is read
        parts = list(node.value) if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def check_characters(text: str, origin: Callable[[int], str]) -> None:
    """Refuse text that cannot be written to a file or displayed.

    Raises:
        ConfigError: it holds a control character or a lone surrogate.
    """
    found = _UNUSABLE.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError(f"{origin(line)}: not valid YAML: the character {found[0]!r} in it.")


def _check_size(text: str, origin: Callable[[int], str]) -> None:
    """Refuse text with too many or too deeply nested values, before it is parsed.

    Raises:
        ConfigError: it has.
    """
    if len(text) <= DEEPEST:
        return
    nodes = depth = 0
    for event in yaml.parse(text, Loader=PlainLoader):
        if isinstance(event, yaml.NodeEvent):
            nodes += 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if nodes > MOST_NODES or depth > DEEPEST:
            line = event.start_mark.line if event.start_mark is not None else 0
            raise _too_large(origin(line + 1), deep=depth > DEEPEST)


def _too_large(where: str, *, deep: bool) -> ConfigError:
    if deep:
        return ConfigError(f"{where}: the file nests deeper than {DEEPEST} levels.")
    return ConfigError(
        f"{where}: the file holds more than {MOST_NODES:,} keys and values, references counted "
        "as what they stand for."
    )


def read_file_text(path: str) -> str:
    """The text of a configuration file; a byte order mark is left out."""
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
    except ValueError:  # a path with the character NUL
        raise ConfigError(f"{path!r}: no file can have this name.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"{path}: the file is larger than {MOST_BYTES:,} bytes, more than any configuration."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}).") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def to_yaml(data: Any) -> str:
    """Write plain values as YAML that reads back unchanged."""
    text: str = yaml.dump(
        data,
        Dumper=PlainDumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
        default_flow_style=False,
    )
    return text


@dataclass(frozen=True)
class Override:
    """One word of the command line.

    Args:
        path: the keys that lead to the value; digits may be the index of a list entry.
        value: the value; None for a removal.
        marks: the marks of the value, by path in it.
        removes: whether the word is `~key`.
    """

    path: tuple[str, ...]
    value: Any
    marks: dict[KeyPath, Mark]
    removes: bool = False


def parse_override(word: str) -> Override:
    """Read one word.

    Args:
        word: `trainor.batch_size=32`, `ensemblor.splits=[validate,test]`, `~trainor.lr_decay`.

    Raises:
        ConfigError: it is neither form.
    """
    check_characters(word, lambda line: COMMAND_LINE)
    removes = word.startswith("~")
    key, equals, text = word.removeprefix("~").partition("=")
    if removes == bool(equals):
        problem = "takes no value" if removes else "has no '='"
        raise ConfigError(f"'{word}' ({COMMAND_LINE}): {problem}. {_SYNTAX}")
    path = tuple(key.split("."))
    if len(path) > DEEPEST:
        raise ConfigError(f"'{visible(word)}' ({COMMAND_LINE}): more than {DEEPEST} nested keys.")
    if any(not part or part != part.strip() or part.startswith(("+", "-")) for part in path):
        raise ConfigError(f"'{word}' ({COMMAND_LINE}): '{key}' is not a key. {_SYNTAX}")
    if path[0] == "includes":
        raise ConfigError(f"includes ({COMMAND_LINE}): is only allowed in a file.")
    if removes:
        return Override(path, None, {}, removes=True)
    value, marks = _parse_value(text.strip())
    return Override(path, value, marks)


def _parse_value(text: str) -> tuple[Any, dict[KeyPath, Mark]]:
    """Parse the value of a word, and keep the text for text keys."""
    try:
        value, marks = read_yaml(text, lambda line: COMMAND_LINE)
    except ConfigError as error:
        note = str(error).removeprefix(COMMAND_LINE).lstrip(":0123456789 ")
        return text, {(): Mark(COMMAND_LINE, note=note)}
    if value is None and text not in _NULL:
        # only a comment or an anchor in YAML
        value = text
    raw = None if value is None else text
    if isinstance(value, list) and not text.startswith("["):
        # "- No effusion." is a list to YAML; a list is written [a, b] here
        value, marks = text, {}
    if isinstance(value, str):
        raw = None
        if text[:1] not in ("'", '"'):
            # text after a # belongs to the value here
            value = text
    marks[()] = replace(marks.get((), Mark(COMMAND_LINE)), raw=raw)
    return value, marks


class _Reader:
    """Converts composed nodes to values and records their places."""

    def __init__(self, origin: Callable[[int], str]) -> None:
        self.origin = origin
        self.marks: dict[KeyPath, Mark] = {}
        self.open: list[yaml.Node] = []

    def where(self, node: yaml.Node) -> str:
        return self.origin(node.start_mark.line + 1)

    def value(self, node: yaml.Node, path: KeyPath, where: str | None = None) -> Any:
        if any(node is other for other in self.open):
            raise ConfigError(f"{self.where(node)}: the anchor contains itself.")
        if len(self.open) >= DEEPEST:
            raise _too_large(self.where(node), deep=True)
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
            raise ConfigError(f"{origin}: '{visible(node.value)}' is not of type {kind}.") from None
        if isinstance(value, str):
            self.check_text(value, origin)
        if kind != "str" and not node.style:
            self.marks[path] = Mark(origin, raw=node.value)
        return value

    @staticmethod
    def check_text(text: str, origin: str) -> None:
        """Refuse characters from escapes (`"\\0"`) that files or terminals cannot handle."""
        found = _UNUSABLE.search(text)
        if found:
            raise ConfigError(
                f"{origin}: the text holds the character {found[0]!r}, which is not allowed."
            )

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.where(key_node)}: a key has to be plain text.")
            key = key_node.value
            self.check_text(key, self.where(key_node))
            if key == "<<" and not key_node.style:
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
            if key_node.value == "<<" and not key_node.style:
                many = isinstance(value_node, yaml.SequenceNode)
                found += reversed(value_node.value) if many else [value_node]
        for other in found:
            if not isinstance(other, yaml.MappingNode) or any(other is one for one in self.open):
                raise ConfigError(f"{self.where(other)}: '<<' takes an anchored mapping.")
        return [other for other in found if isinstance(other, yaml.MappingNode)]
