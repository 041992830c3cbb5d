"""Output of `--help` and `--print-config`."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vilmedic.config.load import Config, Draft, root_signature
from vilmedic.config.namespaces import (
    entries,
    is_node,
    kind_of,
    names,
    registry_of,
    signature,
    target,
)
from vilmedic.config.signature import Param, Signature
from vilmedic.config.transformers_fields import config_signature, model_type_of
from vilmedic.config.tree import KeyPath, dotted
from vilmedic.config.types import (
    Basic,
    Calls,
    ConfigOf,
    Marked,
    NameIn,
    OptionsOf,
    instance_of,
    options,
    spell,
)
from vilmedic.config.wording import describe
from vilmedic.config.yaml_source import read_yaml, to_yaml
from vilmedic.errors import ConfigError, nearest
from vilmedic.registry import REGISTRIES, Registry

WIDEST = 100
DEPTH = 2
"""Depth of the sections that the first page lists: `model` and `model.loss`."""
_ABBREVIATIONS = ("al", "cf", "e.g", "eq", "fig", "i.e", "resp", "sec", "vs")


def print_config(config: Config) -> str:
    """Return the resolved configuration as YAML, with the origin of every value as a comment."""
    text = to_yaml(config.data)
    _, marks = read_yaml(text, str)
    comments: dict[int, str] = {}
    for path, mark in marks.items():
        line = int(mark.origin)
        value = _at(config.data, path)
        if path and line not in comments and not (isinstance(value, dict) and value):
            given = config.tree.has(path)
            comments[line] = config.tree.origin(path) if given else "default"
    lines = text.splitlines()
    widest = max((len(line) for line in lines if len(line) <= 60), default=0)
    return "\n".join(
        f"{line.ljust(widest)}  # {comments[number]}" if number in comments else line
        for number, line in enumerate(lines, start=1)
    )


@dataclass(frozen=True)
class Place:
    """A key or a section of the schema.

    Args:
        path: its dotted key, in parts.
        doc: its description.
        param: its argument; None for a name in a section of names.
        read: the class whose arguments are its keys; None without one.
        given: its values in the configuration.
        node: whether it becomes an object, so that `proto` may choose the class.
        named: the namespace whose names are its keys, as for metrics.
    """

    path: KeyPath
    doc: str
    param: Param | None = None
    read: Signature | None = None
    given: Any = None
    node: bool = False
    named: str | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The values inside, if it is a mapping."""
        return self.given if isinstance(self.given, dict) else {}


def help_page(
    prog: str, purpose: str, own: Sequence[tuple[str, str]], draft: Draft | None = None
) -> str:
    """Return the usage of a command, with a line per section.

    Args:
        prog: the command.
        purpose: its description, in a sentence or two.
        own: its own options, each with a description.
        draft: the given configuration, whose classes are shown; None without one.
    """
    whole = "a section given whole, as in validator.metrics={knn: }, replaces that of the file"
    options = [
        ("key=value", f"set a key: trainor.batch_size=32; {whole}"),
        ("~key", "remove a key that the file sets"),
        ("--check", "check the configuration and end; reads no data"),
        ("--print-config", "print the resolved configuration and its sources"),
        *own,
        ("--help", "print this page"),
        ("--help KEY", "say what a section or a key is: trainor, model.loss, trainor.batch_size"),
    ]
    top = _root(draft)
    keys = [(dotted(one.path), first_sentence(one.doc)) for one in inside(top) if not one.node]
    sections = [(dotted(one.path), _in_a_line(one)) for one in _sections(top)]
    return "\n".join(
        [
            f"usage: {prog} config.yml [key=value ...] [~key ...] [options]",
            "",
            *textwrap.wrap(purpose, width()),
            *("", "options:", *_columns(options)),
            *("", "keys:", *_columns(keys, cut=True)),
            *("", "sections:", *_columns(sections, cut=True)),
        ]
    )


def help_on(topics: Sequence[str], draft: Draft | None = None) -> str:
    """Explain sections and keys.

    Args:
        topics: dotted keys; the last part of one alone means all keys of that name.
        draft: see `help_page`.

    Raises:
        ConfigError: there is no such key.
    """
    lines: list[str] = []
    for topic in topics:
        found = _find(topic, draft)
        for place in found:
            lines += [*_page(place, draft), ""]
        same: dict[tuple[str, ...], list[str]] = {}
        for choice, place in _of_each_class(topic) if not found else ():
            same.setdefault(tuple(_page(place, draft)), []).append(choice)
        for page, choices in same.items():
            heading = f"with {' or '.join(choices)}:"
            lines += [*textwrap.wrap(heading, width()), *page, ""]
    return "\n".join(lines).rstrip("\n")


def keys_named(name: str, draft: Draft | None, *, near: bool = True) -> list[str]:
    """Return the dotted keys whose last part is a name; dashes count as `_`.

    Args:
        name: the name, or a whole dotted key.
        draft: the configuration that sets the keys; None takes all possible keys.
        near: without a match, take the nearest name.
    """
    known = [dotted(one.path) for one in _everything(_root(draft))]
    wanted = name.replace("-", "_")
    exact = [key for key in known if key == wanted or key.endswith(f".{wanted}")]
    if exact or "." in wanted or not near:
        return exact
    meant = nearest(wanted, {key.rpartition(".")[2] for key in known})
    return keys_named(meant.split("'")[1], draft) if meant else []


def width() -> int:
    """Return the columns of the terminal, 100 at most."""
    return max(60, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


# -- the schema as places


def _root(draft: Draft | None) -> Place:
    data = draft.tree.data if draft is not None else {}
    return Place((), "", read=root_signature(), given=data)


def inside(place: Place) -> Iterator[Place]:
    """Return the keys and sections in a section, in the order of the signature."""
    if place.named is not None:
        yield from _names_inside(place, place.named)
    if place.read is None:
        return
    docs = place.read.docs()
    if place.node:
        yield from _proto(place)
    for name, param in place.read.settable.items():
        yield _place(place, name, param, docs.get(name, ""))
    extras = place.read.extras
    if isinstance(extras, Marked) and isinstance(extras.mark, ConfigOf):
        model_type = model_type_of(extras.mark, place.values)
        fields = config_signature(model_type) if model_type is not None else None
        docs = fields.docs() if fields is not None else {}
        for name, param in fields.params.items() if fields is not None else ():
            yield Place((*place.path, name), docs.get(name, ""), param)


def _place(parent: Place, name: str, param: Param, doc: str) -> Place:
    """An argument of the class of a section."""
    place = Place((*parent.path, name), doc, param, given=parent.values.get(name))
    if is_node(param.type):
        try:
            read = target(param.type, place.values).signature
        except ConfigError:
            read = None
        return replace(place, read=read, node=True)
    for mark in _marks(param):
        if isinstance(mark, OptionsOf):
            return replace(place, read=_options(mark, parent))
        if isinstance(mark, Calls):
            return replace(place, named=mark.namespace)
    return place


def _options(mark: OptionsOf, parent: Place) -> Signature | None:
    """The options of the class that a sibling key names."""
    assert parent.read is not None
    own = parent.read.params.get(mark.key)
    name = parent.values.get(mark.key, own.default if own is not None else None)
    try:
        return signature(mark.namespace, name) if isinstance(name, str) else None
    except ConfigError:
        return None


def _names_inside(place: Place, namespace: str) -> Iterator[Place]:
    """The names that a section takes, each with the options of its class."""
    given = dict(entries(place.given)) if isinstance(place.given, dict | list) else {}
    for name in names(namespace):
        try:
            read = signature(namespace, name)
        except ConfigError:
            continue
        summary = read.summary if read is not None else ""
        yield Place((*place.path, name), summary, read=read, given=given.get(name))


def _proto(place: Place) -> Iterator[Place]:
    """The key that chooses the class of a section, where there is a choice."""
    assert place.param is not None
    registry, instance = registry_of(place.param.type), instance_of(place.param.type)
    if registry is None and instance is not None and place.read is not None:
        registry = kind_of(instance.path) if "proto" not in place.read.params else None
    if registry is not None and len(registry.names()) > 1:
        kind = registry.kind.replace("_", " ")
        param = Param("proto", Marked(Basic("text"), NameIn(registry.kind)))
        yield Place((*place.path, "proto"), f"which {kind} this is.", param)


def _marks(param: Param) -> Iterator[Any]:
    for option in options(param.type):
        while isinstance(option, Marked):
            yield option.mark
            option = option.base


def _sections(place: Place) -> Iterator[Place]:
    """Return the sections in a section, down to `DEPTH`."""
    for one in inside(place):
        if one.node:
            yield one
            if len(one.path) < DEPTH:
                yield from _sections(one)


def _everything(place: Place) -> Iterator[Place]:
    """Return all keys and sections in a section, without the names that it accepts."""
    for one in inside(place) if place.named is None and len(place.path) < 8 else ():
        yield one
        yield from _everything(one)


def _find(topic: str, draft: Draft | None) -> list[Place]:
    """Return the places that match a topic.

    Returns:
        The places; none if no configuration is given and only some classes have the key.

    Raises:
        ConfigError: there is none.
    """
    found = _at_path(_root(draft), topic)
    if found is not None:
        return [found]
    if draft is None and next(_of_each_class(topic), None) is not None:
        return []
    known = keys_named(topic, draft, near=False)
    if known and "." not in topic:
        return [place for key in known for place in _find(key, draft)]
    keys = [dotted(one.path) for one in _everything(_root(draft))]
    keys += _keys_of_each_class() if draft is None else []
    hint = nearest(topic, list(dict.fromkeys(keys)))
    if not hint and (near := keys_named(topic, draft)):
        hint = f" Did you mean {near[0]!r}?"
    if draft is None and topic.partition(".")[0] in ("dataset", "model") and "." not in hint:
        hint += " Give a configuration file as well: its proto decides on the keys."
    raise ConfigError(f"--help {topic}: there is no such section or key.{hint}")


def _at_path(place: Place, topic: str) -> Place | None:
    """The key or section of a dotted name below a place."""
    found: Place | None = place
    for part in topic.split("."):
        keys = inside(found) if found is not None else ()
        found = next((one for one in keys if one.path[-1] == part), None)
    return found


def _of_each_class(topic: str) -> Iterator[tuple[str, Place]]:
    """Find a key of a section without a chosen class, in each class that has it.

    Returns:
        The choice, as it is written on the command line, and the key.
    """
    first, _, rest = topic.partition(".")
    section = _at_path(_root(None), first)
    for name, top in _with_each_class(section) if section is not None and rest else ():
        place = _at_path(top, topic)
        if place is not None:
            yield f"{first}.proto={name}", place


def _keys_of_each_class() -> list[str]:
    """Return the dotted keys in sections without a chosen class, those of all their classes."""
    return [
        dotted(one.path)
        for section in inside(_root(None))
        for _, top in _with_each_class(section)
        for one in _everything(top)
        if one.path[0] == section.path[0]
    ]


def _with_each_class(section: Place) -> Iterator[tuple[str, Place]]:
    """Yield each class of a top-level section without a chosen one, and the root with it."""
    registry = _choices(section)
    for name in registry.names() if registry is not None else ():
        given = {section.path[0]: {"proto": name}}
        yield name, Place((), "", read=root_signature(), given=given)


def _choices(place: Place) -> Registry | None:
    """Return the classes of a section while none is chosen."""
    if not place.node or place.read is not None or place.param is None:
        return None
    return registry_of(place.param.type)


# -- as text


def _page(place: Place, draft: Draft | None) -> list[str]:
    """Describe a section with its keys, or a key in full."""
    if place.node:
        lines = textwrap.wrap(f"{dotted(place.path)}: {_in_a_line(place)}", width())
        if (registry := _choices(place)) is not None:
            texts = [(name, _summary(registry.kind, name)) for name in registry.names()]
            example = f"config.yml --help {dotted(place.path)}"
            more = textwrap.wrap(
                f"The keys are those of the class that a configuration names: {example}",
                width(),
            )
            return [*lines, "", *_columns(texts), "", *more]
        for one in inside(place):
            lines += _entry(one, draft)
        return [*lines, *_more(place)]
    lines = _entry(place, draft)
    for one in inside(place) if place.named is None else ():
        lines += _entry(one, draft)
    return [*lines, *_names(place)]


def _more(place: Place) -> list[str]:
    """Explain how to list the keys of nested sections."""
    opening = [one for one in inside(place) if one.node or one.named or _has_names(one)]
    if not opening:
        return []
    listed = ", ".join(f"--help_{dotted(one.path)}" for one in opening)
    lines = textwrap.wrap(f"more: {listed}", width(), subsequent_indent="      ")
    return ["", *(line.replace("--help_", "--help ") for line in lines)]


def _has_names(place: Place) -> bool:
    marks = _marks(place.param) if place.param is not None else ()
    return any(isinstance(mark, NameIn | OptionsOf) for mark in marks)


def _entry(place: Place, draft: Draft | None) -> list[str]:
    """Describe a key: type, default, value and meaning."""
    param = place.param
    head = f"{dotted(place.path)}"
    doc = place.doc
    if place.node:
        head, doc = f"{head}: a section", _in_a_line(place)
    elif param is not None and place.path[-1] != "proto":
        head += f": {describe(param.type)}"
        if param.required:
            head += "; required"
        elif param.default_text:
            head += f"; default {_default(param)}"
    if draft is not None and draft.tree.has(place.path):
        value = draft.tree.get(place.path)
        if not isinstance(value, dict):
            head += f"; now {_inline(value)} ({draft.tree.origin(place.path)})"
    wrap = textwrap.TextWrapper(width(), break_long_words=False, break_on_hyphens=False)
    wrap.initial_indent, wrap.subsequent_indent = "  ", "        "
    lines = wrap.wrap(head)
    wrap.initial_indent = wrap.subsequent_indent = "      "
    return lines + wrap.wrap(_plain(doc))


def _names(place: Place) -> list[str]:
    """List the allowed names of a key, those of this project with a description."""
    if place.named is not None:
        namespace = place.named
    else:
        marks = _marks(place.param) if place.param is not None else ()
        found = [mark for mark in marks if isinstance(mark, NameIn)]
        if not found:
            return []
        namespace = found[0].namespace
    listed = names(namespace)
    if namespace not in REGISTRIES:
        wrap = textwrap.TextWrapper(width(), initial_indent="      ", subsequent_indent="      ")
        return wrap.wrap(f"Names: {', '.join(listed)}.")
    texts = [(name, _summary(namespace, name)) for name in listed]
    more = f"--help {dotted(place.path)}.{listed[0]} lists its options" if place.named else ""
    return [
        "",
        "    names:",
        *_columns(texts, indent=6),
        *(["", f"    {more}"] * bool(more)),
    ]


def _summary(namespace: str, name: str) -> str:
    """Return the first sentence of the docstring of a name."""
    read = signature(namespace, name)
    return first_sentence(read.summary) if read is not None else ""


def _in_a_line(place: Place) -> str:
    """Describe a section: its class, and the first sentence of its docstring."""
    doc = first_sentence(place.doc).partition(";")[0].rstrip(".")
    if place.read is None:
        registry = _choices(place)
        known = f", one of {len(registry.names())}" if registry is not None else ""
        return f"{doc}; its proto{known}, decides on the keys"
    own = place.read.path.partition(".")[2].startswith("config.")
    return doc if own else f"{doc} ({place.read.path.rpartition('.')[2]})"


def _columns(rows: Sequence[tuple[str, str]], *, indent: int = 2, cut: bool = False) -> list[str]:
    """Rows of two columns, wrapped or cut to the width."""
    left = max((len(name) for name, _ in rows), default=0) + 2
    columns = max(20, width() - indent - left)
    lines = []
    for name, text in rows:
        text = _plain(text)
        parts = [_cut(text, columns)] if cut else textwrap.wrap(text, columns)
        for number, part in enumerate(parts or [""]):
            start = name if number == 0 else ""
            lines.append(f"{' ' * indent}{start.ljust(left)}{part}".rstrip())
    return lines


def _cut(text: str, columns: int) -> str:
    """Shorten a text to a line, to its first clause if possible."""
    if len(text) <= columns:
        return text
    clauses = re.split(r"(?<=[:;,])\s", text)
    while len(clauses) > 1 and len(" ".join(clauses)) > columns:
        clauses.pop()
    return textwrap.shorten(" ".join(clauses).rstrip(":;, "), columns, placeholder=" ...")


def first_sentence(text: str) -> str:
    """Return the first sentence of a text; the dot of "et al." does not end it."""
    for point in re.finditer(r"[.!?](?=\s)", text):
        word = text[: point.start()].rpartition(" ")[2].lstrip("(").lower()
        following = text[point.end() :].lstrip()[:1]
        if word not in _ABBREVIATIONS and not following.islower():
            return text[: point.end()]
    return text


def _plain(text: str) -> str:
    """Remove the markup of other packages' docstrings from a text."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text)
    return text.replace("``", "'")


def _default(param: Param) -> str:
    if param.default is None and param.default_text != "None":
        return param.default_text
    return _inline(param.default)


def _inline(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(one)}" for key, one in value.items()) + "}"
    return "''" if value == "" else spell(value)


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data
