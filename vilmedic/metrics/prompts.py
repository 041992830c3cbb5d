"""The sentences that stand for a class: a YAML file, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.sparse import csc_array

from vilmedic.config.yaml_source import compose, read_file_text
from vilmedic.datasets.lines import shown
from vilmedic.errors import ConfigError, DataError, nearest

SIDES = ("positive", "negative")
LISTED = 50  # labels that a message lists


@dataclass(frozen=True)
class ClassPrompts:
    """The prompts of one class.

    Args:
        name: the label.
        positive: sentences that say it is there.
        negative: sentences that say it is not.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


def load_prompts(path: str, labels: Sequence[str] | None) -> list[ClassPrompts]:
    """Read `{class: {positive: [...], negative: [...]}}`.

    Args:
        path: the YAML file.
        labels: the label names of the data; a class must be one of them. None takes any class.

    Returns:
        The classes in the order of the file.

    Raises:
        ConfigError: there is no such file.
        DataError: the file is empty, is not of this form or names an unknown label; all that is
            wrong is said at once, each with its line.
    """
    file = Path(path)
    if not file.is_file():  # a pipe, or a device that gives data for ever, is none
        beside = [str(p) for p in sorted(file.parent.glob("*.y*ml"))]
        raise ConfigError(f"zero_shot.prompts: there is no file '{path}'.{nearest(path, beside)}")
    try:
        root = compose(read_file_text(path), lambda line: f"{path}:{line}")
    except ConfigError as error:
        raise DataError(f"{path}: not a readable YAML file: {error}") from None
    if root is None:
        raise DataError(f"{path}: the file is empty. {_form()}")
    if not isinstance(root, yaml.MappingNode):
        raise DataError(f"{path}:{_line(root)}: not a mapping. {_form()}")
    classes: dict[str, ClassPrompts] = {}
    allowed = None if labels is None else set(labels)
    problems: list[str] = []
    for key, value in root.value:
        name, where = str(key.value), f"{path}:{_line(key)}"
        if name in classes:
            problems.append(f"{where}: the class '{name}' is given twice.")
        if labels is not None and allowed is not None and name not in allowed:
            problems.append(
                f"{where}: the data has no label '{name}'. Allowed: {shown(labels, LISTED)}."
                f"{nearest(name, labels)}"
            )
        sides, found = _sides(value, name, path)
        problems += found
        classes[name] = ClassPrompts(name, sides["positive"], sides["negative"])
    if problems:
        raise DataError("\n".join(problems))
    return list(classes.values())


def as_prompts(prompts: Mapping[str, Any]) -> list[ClassPrompts]:
    """The same out of a mapping; its classes may be any.

    Raises:
        DataError: it is not of this form.
    """
    classes = []
    for name, sides in prompts.items():
        texts = [sides.get(side) for side in SIDES] if isinstance(sides, Mapping) else [None]
        whole = isinstance(sides, Mapping) and set(sides) == set(SIDES)
        for one in texts:
            few = isinstance(one, Sequence) and not isinstance(one, str) and len(one) > 0
            whole = whole and few and all(isinstance(t, str) and t.strip() for t in one or ())
        if not whole:
            raise DataError(f"The prompts of the class '{name}' are not of this form. {_form()}")
        classes.append(ClassPrompts(str(name), *(tuple(one) for one in texts if one)))
    if not classes:
        raise DataError(f"There are no prompts. {_form()}")
    return classes


def prompt_weights(classes: list[ClassPrompts]) -> csc_array:
    """What each prompt contributes to each class: [P, L], float64.

    The mean over the positive prompts of a class minus that over the negative ones; prompts in the
    order of the classes, positive ones first.
    """
    shares: list[float] = []
    starts = [0]
    for c in classes:
        shares += [1 / len(c.positive)] * len(c.positive) + [-1 / len(c.negative)] * len(c.negative)
        starts.append(len(shares))
    return csc_array((shares, range(len(shares)), starts), shape=(len(shares), len(classes)))


def _sides(node: yaml.Node, name: str, path: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    sides: dict[str, tuple[str, ...]] = dict.fromkeys(SIDES, ())
    where = f"{path}:{_line(node)}: class '{name}'"
    if not isinstance(node, yaml.MappingNode):
        return sides, [f"{where}: not a mapping. {_form()}"]
    problems = []
    entries = {str(key.value): (key, value) for key, value in node.value}
    for side, (key, value) in entries.items():
        if side not in SIDES:
            problems.append(
                f"{path}:{_line(key)}: class '{name}' has the unknown key '{side}'. "
                f"Allowed: {', '.join(SIDES)}.{nearest(side, SIDES)}"
            )
        elif not isinstance(value, yaml.SequenceNode):
            problems.append(f"{path}:{_line(value)}: {side} of '{name}' is not a list. {_form()}")
        else:
            texts = [item.value for item in value.value if isinstance(item, yaml.ScalarNode)]
            if len(texts) < len(value.value) or not all(text.strip() for text in texts):
                problems.append(
                    f"{path}:{_line(value)}: {side} of '{name}' holds a prompt that is empty or "
                    "not a text."
                )
            sides[side] = tuple(texts)
    for side in SIDES:
        if side not in entries:
            problems.append(f"{where} has no {side} prompts. {_form()}")
        elif isinstance(entries[side][1], yaml.SequenceNode) and not entries[side][1].value:
            problems.append(f"{where}: the list of {side} prompts is empty. {_form()}")
    return sides, problems


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _form() -> str:
    return "Expected: {class: {positive: [text, ...], negative: [text, ...]}}."
