"""The scores that a run is judged by: their names, and whether higher or lower is better.

A metric declares its numbers as a literal mapping in its class body,

    numbers: ClassVar = {"auroc": "higher", "*_uniformity": "lower", "words": "neither"}

where `*` stands for any text, as in numbers that are named after features. It is read from the
source text here, without importing the metric, so that a misspelt `trainor.early_stop_metric` is
known before torch is loaded.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import griffe

from vilmedic.config.sources import bases, find_class
from vilmedic.errors import ConfigError, nearest
from vilmedic.registry import METRICS

Better = Literal["higher", "lower", "neither"]
Declared = Mapping[str, str]
"""Names of numbers, or patterns of them, with what is better."""

BETTER = ("higher", "lower", "neither")
PUBLISHED_NAMES = {"validate": "validation"}
"""Score names start with the split; `validate` gives the published name `validation_loss`."""
EMA = "ema_"
"""In front of the scores of the averaged copy that `trainor.ema` keeps."""
KEY = "trainor.early_stop_metric"

T = TypeVar("T")


def distinct(calls: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """The calls with a number after each name that came before: `knn`, `knn_2`."""
    seen: dict[str, int] = {}
    named = []
    for name, call in calls:
        seen[name] = seen.get(name, 0) + 1
        named.append((name if seen[name] == 1 else f"{name}_{seen[name]}", call))
    return named


def declared_numbers(metric: str) -> dict[str, str] | None:
    """The numbers that a metric declares, read from its source text.

    Args:
        metric: its name in a configuration.

    Returns:
        None when the text does not show them, or there is no such metric.
    """
    try:
        location = METRICS.location(metric)
    except ConfigError:
        return None
    waiting, seen = [location.replace(":", ".")], set()
    while waiting:
        path = waiting.pop(0)
        cls = None if path in seen else find_class(path)
        seen.add(path)
        if cls is None:
            continue
        stated = cls.members.get("numbers")
        if isinstance(stated, griffe.Attribute) and stated.value is not None:
            return _literal(str(stated.value))
        waiting += bases(cls)
    return None


def _literal(text: str) -> dict[str, str] | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if is_declaration(value) else None


def is_declaration(value: Any) -> bool:
    """Whether a value has the form in which a metric declares its numbers."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and better in BETTER for name, better in value.items()
    )


class Scores:
    """The scores that an evaluation during training can give.

    Args:
        splits: the splits that are scored.
        metrics: each metric's name among the scores, and what it declares; None when that is not
            known.
        ema: whether the averaged copy is scored as well.
    """

    def __init__(
        self, splits: Iterable[str], metrics: Iterable[tuple[str, Declared | None]], *, ema: bool
    ) -> None:
        self._known: dict[str, str] = {}
        self._unknown: list[str] = []
        self._ema = ema
        metrics = list(metrics)
        for copy in ("", EMA) if ema else ("",):
            for split in splits:
                prefix = f"{copy}{PUBLISHED_NAMES.get(split, split)}"
                self._known[f"{prefix}_loss"] = "lower"
                for name, numbers in metrics:
                    if numbers is None:
                        self._unknown.append(f"{prefix}_{name}_*")
                    for number, better in (numbers or {}).items():
                        self._known[f"{prefix}_{name}_{number}"] = better

    def better(self, score: str) -> str | None:
        """Which direction is better; None for a metric that does not say what it gives.

        Args:
            score: the name of a score.

        Raises:
            ConfigError: there is no such score, or it tells nothing about better or worse.
        """
        found = self._known.get(score) or next(
            (better for known, better in self._known.items() if fnmatchcase(score, known)), None
        )
        if found in ("higher", "lower"):
            return found
        if found is None and any(fnmatchcase(score, pattern) for pattern in self._unknown):
            return None
        fit = [name for name, better in self._known.items() if better != "neither"]
        fit += self._unknown
        problem = "an evaluation of this configuration does not give it"
        if found == "neither":
            problem = "neither a higher nor a lower value of it is better"
        plain = ", ".join(name for name in fit if not name.startswith(EMA))
        plain = plain or "none, as validator.splits is empty"
        copies = f", and those of the average with {EMA} in front" if self._ema else ""
        raise ConfigError(
            f"given '{score}', but {problem}. Allowed: {plain}{copies}.{nearest(score, fit)}"
        )


def read_scores(splits: Iterable[str], metrics: Iterable[str], *, ema: bool) -> Scores:
    """The scores of a configuration, as far as the source text of its metrics shows them."""
    named = distinct((name, declared_numbers(name)) for name in metrics)
    return Scores(splits, named, ema=ema)


def known_better(score: str) -> str | None:
    """Which direction of a score is better, by its name alone.

    For checkpoints and pages that only have the name.

    Args:
        score: such as `validation_loss` or `ema_validation_knn_2_auroc`.

    Returns:
        None when no metric that is known declares it.
    """
    for metric in METRICS.names():
        match = re.search(rf"_{re.escape(metric)}(?:_\d+)?_(\w+)$", score)
        for number, better in (declared_numbers(metric) or {}).items() if match else ():
            if match is not None and fnmatchcase(match[1], number):
                return None if better == "neither" else better
    return "lower" if score == "loss" or score.endswith("_loss") else None
