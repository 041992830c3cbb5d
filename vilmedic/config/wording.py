"""Sentence helpers for messages and `--help`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from vilmedic.config.namespaces import registry_of
from vilmedic.config.signature import read_signature
from vilmedic.config.tree import KeyPath, dotted
from vilmedic.config.types import (
    ANY,
    BOUNDS,
    NUMBERS,
    AnyOf,
    Basic,
    Choice,
    Instance,
    Lengths,
    ListOf,
    MapOf,
    Marked,
    Matching,
    TupleOf,
    Type,
    UsedWith,
    Within,
    is_number,
    is_usable,
    options,
    plain,
    spell,
)
from vilmedic.errors import nearest, visible

_YAML_1_1 = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def describe(kind: Type) -> str:
    """Return the type in words, for messages."""
    if isinstance(kind, Marked):
        mark = kind.mark
        if isinstance(mark, BOUNDS):
            bounded = _bounded(kind, one=True)
            return bounded or f"{describe(kind.base)} {mark.words()}"
        if isinstance(mark, Matching):
            return mark.words
        if isinstance(mark, Lengths):
            lengths = " or ".join(str(length) for length in mark.allowed)
            return describe(kind.base).replace("list of ", f"list of {lengths} ", 1)
        return describe(kind.base)
    if isinstance(kind, Choice):
        values = ", ".join(spell(value) for value in kind.values)
        return values if len(kind.values) == 1 else f"one of {values}"
    if isinstance(kind, ListOf):
        if kind.item in (ANY, Basic("foreign")):
            return "list"
        return f"list of {_bounded(kind.item, one=False) or describe(kind.item)}"
    if isinstance(kind, TupleOf):
        several = _bounded(kind.items[0], one=False) if len(set(kind.items)) == 1 else ""
        if several:
            return f"list of {len(kind.items)} {several}"
        return f"list of {len(kind.items)}: " + ", ".join(describe(one) for one in kind.items)
    if isinstance(kind, MapOf):
        return "mapping" if plain(kind.value) == ANY else f"mapping to {describe(kind.value)}"
    if isinstance(kind, AnyOf):
        known = [one for one in options(kind) if one != Basic("foreign")] or [ANY]
        words = list(dict.fromkeys(describe(one) for one in known if one != Basic("null")))
        # an integer is a number
        wider = {one: one.replace("integer", "number", 1) for one in words}
        words = [one for one in words if wider[one] == one or wider[one] not in words]
        null = Basic("null") in known
        listed = " or ".join(words) or "null"
        return f"{listed}, or null" if null and words else listed
    if isinstance(kind, Instance):
        return f"mapping with the keys of {kind.path.rpartition('.')[2]}"
    words_of = {"int": "integer", "float": "number", "bool": "true or false"}
    return words_of.get(kind.name, "anything" if kind.name == "foreign" else kind.name)


def _bounded(kind: Type, *, one: bool) -> str:
    """Return a number type with its bounds in words, or several of them; empty for other types."""
    bounds: list[str] = []
    while isinstance(kind, Marked) and isinstance(kind.mark, (*BOUNDS, UsedWith, Within)):
        if isinstance(kind.mark, BOUNDS):
            bounds.insert(0, kind.mark.words())
        kind = kind.base
    if kind not in (*NUMBERS, ANY) or not isinstance(kind, Basic):
        return ""
    noun = {("int", True): "integer", ("int", False): "integers"}.get(
        (kind.name, one), "number" if one else "numbers"
    )
    return f"{noun} {' and '.join(bounds)}".strip()


def allowed(kind: Type) -> str:
    """Describe the allowed values of a type, with the keys of a mapping and the names of a kind."""
    registry = registry_of(kind)
    if registry is not None:
        return f"mapping with a proto, one of {', '.join(registry.names()) or 'none'}"
    if isinstance(kind, Instance):
        read = read_signature(kind.path)
        keys = [
            f"{name} (needed)" if param.required else name
            for name, param in (read.settable if read else {}).items()
        ]
        return f"mapping with {', '.join(keys)}" if keys else describe(kind)
    return describe(kind)


def shown(value: Any) -> str:
    """Return a value as messages quote it."""
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        if any(isinstance(one, dict | list) for one in value):
            return f"a list of {len(value)}"
        return "[" + ", ".join(visible(spell(one)) for one in value[:20]) + "]"
    return f"'{visible(value)}'" if isinstance(value, str) else spell(value)


def mismatch(kind: Type, given: Any) -> str:
    """Message that a value is of the wrong type."""
    alternatives = [plain(one) for one in options(kind)]
    hint = ""
    if is_number(given) and not is_usable(given):
        hint = " It has to " + ("fit into 64 bits." if isinstance(given, int) else "be finite.")
    elif isinstance(given, float) and given.is_integer() and Basic("int") in alternatives:
        hint = f" Did you mean '{int(given)}'?"
    elif isinstance(given, str):
        choices = [one for one in alternatives if isinstance(one, Choice)]
        words = [spell(value) for one in choices for value in one.values]
        if Basic("bool") in alternatives:
            words += ["true", "false"]
        meant = _YAML_1_1.get(given.lower())
        hint = f" Did you mean '{meant}'?" if meant in words else nearest(given, words)
    return f"given {shown(given)}; allowed: {allowed(kind)}.{hint}"


def unknown_key(path: KeyPath, given: Any, known: Sequence[str], everywhere: Sequence[str]) -> str:
    """Message that a key is unknown: the nearest one first, as the list of all is long.

    Args:
        path: the key.
        given: its value.
        known: the keys that are known there.
        everywhere: every dotted key of the schema.
    """
    key = str(path[-1])
    siblings = {name.lower(): name for name in known}
    exact = [name for name in everywhere if name.rpartition(".")[2] == key]
    close = difflib.get_close_matches(key.lower(), siblings, n=1, cutoff=0.6)
    ratio = difflib.SequenceMatcher(None, key.lower(), close[0]).ratio() if close else 0.0
    hint = ""
    if close and (ratio >= 0.8 or not exact):
        hint = dotted((*path[:-1], siblings[close[0]]))
    elif exact:
        hint = exact[0]
    else:
        far = {name.rpartition(".")[2].lower(): name for name in reversed(everywhere)}
        match = difflib.get_close_matches(key.lower(), far, n=1, cutoff=0.8)
        hint = far[match[0]] if match else ""
    under = f" under '{dotted(path[:-1])}'" if path[:-1] else " at the top level"
    tail = f" Did you mean '{hint}'?" if hint else ""
    listed = ", ".join(known) or "no keys"
    return f"unknown key, given {shown(given)}.{tail} Allowed{under}: {listed}."
