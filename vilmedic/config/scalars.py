"""Judges single values: text, numbers, truth values, null."""

from __future__ import annotations

from typing import Any

from vilmedic.config.annotations import Basic, Choice, Type, is_number, is_usable
from vilmedic.config.wording import spell

UNFIT = object()
"""What `read_scalar` returns for a value that its type does not allow."""


def read_scalar(kind: Type, given: Any, raw: str | None) -> Any:
    """A value as a plain type wants it.

    Args:
        kind: the type.
        given: the value as YAML reads it.
        raw: how it was spelt, where reading it loses that: keys for text take what was typed.

    Returns:
        The value, or `UNFIT`. A whole number becomes one with a fraction where one is wanted; the
        reverse is not done, and a truth value is no number. Whatever the type, a number is finite
        and fits into 64 bits.
    """
    if isinstance(kind, Choice):
        for value in kind.values:
            if type(value) is type(given) and value == given:
                return value
        return raw if raw is not None and raw in kind.values else UNFIT
    if not isinstance(kind, Basic):
        return UNFIT
    if kind.name in ("any", "foreign"):
        return given if is_usable(given) else UNFIT
    if kind.name == "null":
        return None if given is None else UNFIT
    if kind.name == "bool":
        return given if isinstance(given, bool) else UNFIT
    if kind.name == "int":
        return given if is_number(given) and isinstance(given, int) and is_usable(given) else UNFIT
    if kind.name == "float":
        return float(given) if is_number(given) and is_usable(given) else UNFIT
    return UNFIT if given is None else _text(given, raw)


def _text(given: Any, raw: str | None) -> Any:
    if isinstance(given, str):
        return given
    if raw is not None:
        return raw
    # an interpolation may give a number to a key for text
    return UNFIT if isinstance(given, dict | list) else spell(given)


def wrong_folder_name(name: str) -> str:
    """What keeps text from being the name of a folder inside another one; empty when nothing does.

    Several parts, `group/run`, are a folder in a folder.
    """
    parts = name.split("/")
    if len(name.encode("utf-8", "replace")) > 200:
        return "allowed: at most 200 bytes."
    if any(not character.isprintable() for character in name):
        return "allowed: no line breaks and no control characters."
    if "\\" in name or any(part.strip() in ("", ".", "..") for part in parts):
        return "allowed: the name of a folder inside ckpt_dir, such as my_run or group/my_run."
    return ""
