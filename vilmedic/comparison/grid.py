"""Sweep values on the command line: a run for each combination, or a search space."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vilmedic.config.load import Config, load
from vilmedic.config.types import wrong_folder_name
from vilmedic.config.yaml_source import parse_override
from vilmedic.errors import ConfigError

LONGEST = 120  # letters of the name of a run
MOST_RUNS = 10_000
MOST_CORNERS = 1_000  # combinations of a search that are checked before it starts: a few seconds
NOT_VARIED = ("name", "ckpt", "ckpt_dir")
_RANGE = re.compile(r"(log|lin|int)\(([^,()]+),([^,()]+)(?:,([^,()]+))?\)")
_LETTERS = re.compile(r"[^\w.+=-]+")  # not allowed in a folder name
_PAIRS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Planned:
    """A run of a sweep.

    Args:
        name: of the run, `<sweep>/<what varies>`.
        words: the overrides of its command line, its name and `ckpt=auto` among them.
        config: the checked configuration.
    """

    name: str
    words: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> Path:
        """Its directory."""
        return self.config.run_dir


@dataclass(frozen=True)
class Range:
    """A range of values for a search.

    Args:
        kind: `log`, `lin` or `int`: numbers at equal ratios or distances, or whole numbers.
        low: the lower end, included.
        high: the upper end, included.
    """

    kind: str
    low: float
    high: float

    def text(self, value: float) -> str:
        """Return a value as text for the command line of a run."""
        if self.kind == "int":
            return str(round(value))
        return repr(min(max(float(f"{value:.6g}"), self.low), self.high))


Axes = dict[str, "list[str] | Range"]
"""For each varied key its values, as they were typed, or its range."""


@dataclass(frozen=True)
class Space:
    """Search space: the varied keys, with their checked ends and values.

    Args:
        path: the configuration file.
        fixed: the overrides of all runs.
        axes: what varies.
        corner: a run at the first end or value of each.
    """

    path: str
    fixed: tuple[str, ...]
    axes: Axes
    corner: Planned

    @property
    def name(self) -> str:
        """The name of the search."""
        return self.corner.name

    def run_name(self, number: int, values: Sequence[str]) -> str:
        """The name of a trial: `<search>/trial=007-lr=0.001`."""
        return f"{self.name}/trial={number:03d}-{_named(_short_keys(list(self.axes)), values)}"

    def run(self, name: str, values: Sequence[str]) -> Planned:
        """The run of a trial.

        Raises:
            ConfigError: its values do not go together.
        """
        return _planned(self.path, self.fixed, dict(zip(self.axes, values, strict=True)), name)


def plan(path: str, words: Sequence[str]) -> list[Planned]:
    """Return the runs of a sweep, all checked; loads no torch.

    Args:
        path: the configuration file.
        words: overrides; those with several values are varied.

    Raises:
        ConfigError: all that is wrong with any of them.
    """
    fixed, axes = read_axes(words)
    count = math.prod(len(values) for values in axes.values())
    if count > MOST_RUNS:
        raise ConfigError(f"the grid has {count:,} runs; allowed: at most {MOST_RUNS:,}.")
    base = _base(path, fixed, {key: values[0] for key, values in axes.items()})
    runs: list[Planned] = []
    problems: dict[str, str] = {}
    for point, name in zip(itertools.product(*axes.values()), run_names(axes), strict=True):
        full = f"{base}/{name}" if name else base
        try:
            runs.append(_planned(path, fixed, dict(zip(axes, point, strict=True)), full))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, full)
    if problems:
        raise ConfigError(f"{name}: {problem}" for problem, name in problems.items())
    if same := _written_twice(runs):
        raise ConfigError(
            f"{one}: is the same run as {first}, with a value written in another way."
            for first, one in same
        )
    return runs


def _written_twice(runs: Sequence[Planned]) -> list[tuple[str, str]]:
    """Return messages about runs that are equal except for the name (`lr=0.001,1e-3`)."""
    known: dict[str, str] = {}
    found = []
    for run in runs:
        content = json.dumps({**run.config.data, "name": None}, default=str)
        if (first := known.setdefault(content, run.name)) != run.name:
            found.append((first, run.name))
    return found


def plan_search(path: str, words: Sequence[str]) -> Space:
    """Return the search space, checked at each end and value; loads no torch.

    All combinations are checked, or each end and value alone where there are more than 1,000.

    Args:
        path: the configuration file.
        words: overrides; those with several values or a range are varied.

    Raises:
        ConfigError: all that is wrong with any of them.
    """
    fixed, axes = _read_axes(words)
    if not axes:
        raise ConfigError(
            "--search: nothing varies. Give a key a range or several values, as in "
            "'trainor.optim_params.lr=log(1e-5,1e-3)'."
        )
    ends = {
        key: [one.text(one.low), one.text(one.high)] if isinstance(one, Range) else one
        for key, one in axes.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    points: Iterable[dict[str, str]]
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        combined = itertools.product(*ends.values())
        points = (dict(zip(ends, values, strict=True)) for values in combined)
    else:
        points = ({**first, key: value} for key, values in ends.items() for value in values)
    base = _base(path, fixed, first)
    corners: list[Planned] = []
    problems: dict[str, None] = {}
    for point in points:
        try:
            corners.append(_planned(path, fixed, point, base))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(problems)
    return Space(path, tuple(fixed), axes, corners[0])


def read_axes(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides with one value, and keys with several.

    Values are separated by commas outside brackets and quotes, or given as `log(1e-5,1e-3,5)` or
    `lin(0,1,3)`: that many values from the first to the second, at equal ratios or distances.

    Args:
        words: `key=value`, `key=value,value` and `~key`.

    Returns:
        The words with one value, and the values of each key that varies, as they were typed.

    Raises:
        ConfigError: a word is none of these, or a key is given twice.
    """
    fixed, axes = _read_axes(words)
    grid = {key: values for key, values in axes.items() if not isinstance(values, Range)}
    if len(grid) < len(axes):
        raise ConfigError(
            f"{key}: a range without a number of values is for --search; allowed in a grid: "
            "log(from,to,how many), as in log(1e-5,1e-3,5), or lin."
            for key in axes
            if key not in grid
        )
    return fixed, grid


def _read_axes(words: Sequence[str]) -> tuple[list[str], Axes]:
    """The same, with ranges for a search."""
    fixed: list[str] = []
    axes: Axes = {}
    problems: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        try:
            values = _values(key, text) if equals else [""]
            if not isinstance(values, Range) and len(values) == 1:
                word = f"{key}={values[0]}" if equals else word
                parse_override(word)
                fixed.append(word)
                continue
            if key in NOT_VARIED:
                given = "a range" if isinstance(values, Range) else f"{len(values)} values"
                raise ConfigError(f"{key}: given {given}; a sweep sets it itself.")
            if key in axes or any(one.partition("=")[0] == key for one in fixed):
                raise ConfigError(f"{key}: is given twice.")
            if not isinstance(values, Range):
                pairs = itertools.combinations(values, 2)
                if same := next((one for one, other in pairs if one == other), None):
                    raise ConfigError(f"{key}: the value {same} is given twice.")
            for value in ["0"] if isinstance(values, Range) else values:
                parse_override(f"{key}={value}")
            axes[key] = values
        except ConfigError as error:
            problems += error.problems
    problems += [
        f"{key}: is given twice."
        for key in axes
        if any(one.removeprefix("~").partition("=")[0] == key for one in fixed)
    ]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return fixed, axes


def run_names(axes: dict[str, list[str]]) -> list[str]:
    """Name each combination by its varied keys: `fraction=0.01-seed=0`.

    Keys are shortened as long as they stay unique. Characters that are not allowed in a folder
    name become `_`; names that are too long or equal end with digits of a hash.
    """
    short = _short_keys(list(axes))
    names, whole = [], []
    for point in itertools.product(*axes.values()):
        whole.append(_text(short, point))
        names.append(_LETTERS.sub("_", whole[-1]))
    if len(set(names)) < len(names) or any(len(name.encode()) > LONGEST for name in names):
        names = [_hashed(name, text) for name, text in zip(names, whole, strict=True)]
    return names


def _named(short: Sequence[str], values: Sequence[str]) -> str:
    """Return the varied values of a run as a part of its name."""
    text = _text(short, values)
    name = _LETTERS.sub("_", text)
    return name if len(name.encode()) <= LONGEST else _hashed(name, text)


def _text(short: Sequence[str], values: Sequence[str]) -> str:
    return "-".join(f"{key}={value}" for key, value in zip(short, values, strict=True))


def _hashed(name: str, text: str) -> str:
    return f"{name[: LONGEST // 2]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _base(path: str, fixed: Sequence[str], first: dict[str, str]) -> str:
    """Return the name of the sweep: that of the configuration with the first value of each key."""
    words = [f"{key}={value}" for key, value in first.items()]
    return load(path, [*fixed, *words], training=True).name


def _planned(path: str, fixed: Sequence[str], varied: dict[str, str], name: str) -> Planned:
    """A checked run.

    Raises:
        ConfigError: what is wrong with it.
    """
    words = [word for word in fixed if not word.startswith("name=")]
    words += [f"{key}={value}" for key, value in varied.items()]
    words += [f"name={name}", "ckpt=auto"]
    if wrong := wrong_folder_name(name):
        raise ConfigError(f"name: given '{name}', of the sweep; {wrong}")
    return Planned(name, tuple(words), load(path, words, training=True))


def _short_keys(keys: list[str]) -> list[str]:
    """Shorten keys to as many last parts as make them unique."""
    found = []
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            short = ".".join(parts[-count:])
            if sum(f".{one}".endswith(f".{short}") for one in keys) == 1:
                break
        found.append(short)
    return found


def _values(key: str, text: str) -> list[str] | Range:
    """The values of a word, as they were typed, or a range."""
    text = text.strip()
    if match := _RANGE.fullmatch(text):
        kind, start, end, count = match.groups()
        if kind != "int" or count is None:
            return _range(key, kind, start, end, count)
    if re.match(r"(log|lin|int)\(", text):
        raise ConfigError(
            f"{key}: given {text}; allowed: log(from,to,how many), as in log(1e-5,1e-3,5), or lin; "
            "with --search also log(from,to), lin(from,to) and int(from,to)."
        )
    values = _split(key, text)
    if len(values) > 1 and not all(values):
        raise ConfigError(f"{key}: given {text}; a value between two commas is empty.")
    return values


def _split(key: str, text: str) -> list[str]:
    """Split text at commas outside brackets and quotes."""
    values: list[str] = []
    closing: list[str] = []
    start, quote = 0, ""
    for place, letter in enumerate(text):
        if quote:
            escaped = quote == '"' and text[place - 1] == "\\"
            quote = "" if letter == quote and not escaped else quote
        elif letter in "'\"" and _begins(text[start:place].rstrip(), closing):
            quote = letter
        elif letter in _PAIRS:
            closing.append(_PAIRS[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == "," and not closing:
            values.append(text[start:place].strip())
            start = place + 1
    if quote or closing:
        raise ConfigError(f"{key}: given {text}; a {quote or closing[-1]} is missing.")
    return [*values, text[start:].strip()]


def _begins(before: str, closing: list[str]) -> bool:
    """Return whether a quote after some text opens a quoted one, unlike that in `it's`."""
    return not before or bool(closing and before[-1] in "[{(,:")


def _range(key: str, kind: str, start: str, end: str, count: str | None) -> list[str] | Range:
    """Return a number of values between two ends, or a range without a number.

    Raises:
        ConfigError: the ends are invalid.
    """
    given = f"{key}: given {kind}({','.join(filter(None, (start, end, count)))})"
    try:
        number = int if kind == "int" else float
        low, high, steps = number(start), number(end), None if count is None else int(count)
    except ValueError:
        whole = "whole " if kind == "int" else ""
        raise ConfigError(f"{given}, which are no {whole}numbers.") from None
    if not math.isfinite(high - low):
        raise ConfigError(f"{given}; allowed: finite ends.")
    if low == high or (kind == "log" and min(low, high) <= 0):
        above = " above 0" if kind == "log" else ""
        raise ConfigError(f"{given}; allowed: two different ends{above}.")
    if steps is None:
        return Range(kind, min(low, high), max(low, high))
    if not 2 <= steps <= MOST_RUNS:
        raise ConfigError(f"{given}; allowed: 2 to {MOST_RUNS:,} values.")
    shares = [step / (steps - 1) for step in range(steps)]
    if kind == "log":
        found = [math.exp(math.log(low) * (1 - one) + math.log(high) * one) for one in shares]
    else:
        found = [low * (1 - one) + high * one for one in shares]
    return [f"{value:.6g}" for value in found]
