"""What `--help` and `--print-config` print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

from vilmedic.config.load import Config, Draft, root_signature
from vilmedic.config.namespaces import entries, is_node, names, registry_of, signature, target
from vilmedic.config.signature import Param, Signature
from vilmedic.config.transformers_fields import config_signature, model_type_of
from vilmedic.config.tree import KeyPath, dotted
from vilmedic.config.types import (
    Calls,
    ConfigOf,
    Instance,
    Marked,
    NameIn,
    OptionsOf,
    options,
    spell,
)
from vilmedic.config.wording import describe
from vilmedic.config.yaml_source import read_yaml, to_yaml
from vilmedic.errors import ConfigError
from vilmedic.registry import REGISTRIES

_WIDTH = 100


def print_config(config: Config) -> str:
    """The resolved configuration as YAML, with the origin of every value behind it."""
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


def help_text(usage: str, draft: Draft | None) -> str:
    """Every key with its type, its default and what it means.

    Args:
        usage: the first lines.
        draft: the configuration given, whose values and choices are shown; None without one.
    """
    blocks = [usage.rstrip(), ""]
    data = draft.tree.data if draft is not None else {}
    for path, param, doc, note in _keys(root_signature(), data, ()):
        blocks.append(_entry(path, param, doc, note, draft))
    return "\n".join(blocks)


def _keys(read: Signature, data: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Param, str, str]]:
    """The keys of a section and of the sections in it, each with its doc and a further line."""
    docs = read.docs()
    given = data if isinstance(data, dict) else {}
    for name, param in read.settable.items():
        where = (*path, name)
        doc = docs.get(name, "")
        if is_node(param.type):
            yield from _node_keys(where, param, doc, given.get(name))
            continue
        yield where, param, doc, _names_of(param)
        for option in options(param.type):
            mark = option.mark if isinstance(option, Marked) else None
            if isinstance(mark, OptionsOf):
                yield from _option_keys(mark, where, read, given)
            elif isinstance(mark, Calls):
                yield from _call_keys(mark.namespace, where, given.get(name))
    yield from _extra_keys(read, given, path)


def _node_keys(
    where: KeyPath, param: Param, doc: str, node: Any
) -> Iterator[tuple[KeyPath, Param, str, str]]:
    node = node if isinstance(node, dict) else {}
    registry = registry_of(param.type)
    try:
        found = target(param.type, node)
    except ConfigError:
        listed = ", ".join(registry.names()) if registry is not None else ""
        yield where, param, doc, f"Needs proto, one of: {listed}."
        return
    summary = found.signature.summary if found.signature is not None else ""
    cls = found.path.rpartition(".")[2]
    yield where, param, doc, f"{cls}: {summary}" if summary else cls
    if found.signature is not None and len(where) < 8:
        yield from _keys(found.signature, node, where)


def _call_keys(
    namespace: str, where: KeyPath, given: Any
) -> Iterator[tuple[KeyPath, Param, str, str]]:
    """The options of everything that a registry has, or of what is used from another namespace."""
    if namespace in REGISTRIES:
        listed = names(namespace)
    else:
        listed = list(dict.fromkeys(name for name, _ in entries(given)))
    for name in listed:
        try:
            read = signature(namespace, name)
        except ConfigError:
            continue
        if read is not None:
            yield from _section((*where, name), read)


def _section(where: KeyPath, read: Signature) -> Iterator[tuple[KeyPath, Param, str, str]]:
    yield where, Param(str(where[-1]), Instance(read.path)), first_sentence(read.summary), ""
    for name, param in read.settable.items():
        yield (*where, name), param, first_sentence(read.docs().get(name, "")), ""


def first_sentence(text: str) -> str:
    """The beginning of a text, at most two hundred letters."""
    sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return textwrap.shorten(sentence, 200, placeholder=" ...")


def _option_keys(
    mark: OptionsOf, where: KeyPath, read: Signature, given: dict[str, Any]
) -> Iterator[tuple[KeyPath, Param, str, str]]:
    default = read.params[mark.key].default if mark.key in read.params else None
    name = given.get(mark.key, default)
    try:
        of = signature(mark.namespace, name) if isinstance(name, str) else None
    except ConfigError:
        return
    if of is not None:
        docs = of.docs()
        for option, param in of.settable.items():
            yield (*where, option), param, first_sentence(docs.get(option, "")), ""


def _extra_keys(
    read: Signature, given: dict[str, Any], path: KeyPath
) -> Iterator[tuple[KeyPath, Param, str, str]]:
    if not (isinstance(read.extras, Marked) and isinstance(read.extras.mark, ConfigOf)):
        return
    model_type = model_type_of(read.extras.mark, given)
    fields = config_signature(model_type) if model_type is not None else None
    if fields is not None:
        docs = fields.docs()
        for name, param in fields.params.items():
            yield (*path, name), param, first_sentence(docs.get(name, "")), ""


def _names_of(param: Param) -> str:
    for option in options(param.type):
        if isinstance(option, Marked) and isinstance(option.mark, NameIn | Calls):
            return f"Names: {', '.join(names(option.mark.namespace))}."
    return ""


def _entry(path: KeyPath, param: Param, doc: str, note: str, draft: Draft | None) -> str:
    head = dotted(path)
    if not is_node(param.type):
        head += f": {describe(param.type)}"
        if param.required:
            head += "; required"
        elif param.default_text:
            head += f"; default {_default(param)}"
    if draft is not None and draft.tree.has(path):
        value = draft.tree.get(path)
        if not isinstance(value, dict):
            head += f"; now {_inline(value)} ({draft.tree.origin(path)})"
    body = [line for text in (doc, note) if text for line in textwrap.wrap(text, _WIDTH - 6)]
    return "\n".join([f"  {head}", *(f"      {line}" for line in body)])


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
