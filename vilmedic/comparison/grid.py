"""The grid of a sweep: what varies, read from the command line, and a run for each combination."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vilmedic.config.load import Config, load
from vilmedic.config.types import wrong_folder_name
from vilmedic.config.yaml_source import parse_override
from vilmedic.errors import ConfigError

LONGEST = 120  # letters of the name of a run
MOST_RUNS = 10_000
NOT_VARIED = ("name", "ckpt", "ckpt_dir")
_RANGE = re.compile(r"(log|lin)\(([^,()]+),([^,()]+),([^,()]+)\)")
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


def plan(path: str, words: Sequence[str]) -> list[Planned]:
    """The runs of a sweep, each of them checked; loads no torch.

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
    base = load(path, fixed, training=True).name if not axes else _base(path, fixed, axes)
    names = run_names(axes)
    runs: list[Planned] = []
    problems: dict[str, str] = {}
    for point, name in zip(itertools.product(*axes.values()), names, strict=True):
        varied = [f"{key}={value}" for key, value in zip(axes, point, strict=True)]
        full = f"{base}/{name}" if name else base
        own = [*(word for word in fixed if not word.startswith("name=")), *varied]
        own += [f"name={full}", "ckpt=auto"]
        try:
            if wrong := wrong_folder_name(full):
                raise ConfigError(f"name: given '{full}', of the sweep; {wrong}")
            runs.append(Planned(full, tuple(own), load(path, own, training=True)))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, full)
    if problems:
        raise ConfigError(f"{name}: {problem}" for problem, name in problems.items())
    return runs


def read_axes(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides with one value, and keys with several.

    Values are separated by commas that stand in no brackets and no quotes, or are given as
    `log(1e-5,1e-3,5)` or `lin(0,1,3)`: so many values from the first to the second, at equal ratios
    or distances.

    Args:
        words: `key=value`, `key=value,value` and `~key`.

    Returns:
        The words with one value, and the values of each key that varies, as they were typed.

    Raises:
        ConfigError: a word is none of these, or a key is given twice.
    """
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    problems: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        try:
            values = _values(key, text) if equals else [""]
            if len(values) == 1:
                word = f"{key}={values[0]}" if equals else word
                parse_override(word)
                fixed.append(word)
                continue
            if key in NOT_VARIED:
                raise ConfigError(f"{key}: given {len(values)} values; a sweep sets it itself.")
            if key in axes or any(one.partition("=")[0] == key for one in fixed):
                raise ConfigError(f"{key}: is given twice.")
            same = {one: other for one, other in itertools.combinations(values, 2) if one == other}
            if same:
                raise ConfigError(f"{key}: the value {next(iter(same))} is given twice.")
            for value in values:
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
    """A name for each combination, made of what varies: `fraction=0.01-seed=0`.

    Keys are as short as tells them apart. Letters that have no place in the name of a folder become
    `_`; names that are too long or the same end with digits of a hash.
    """
    short = _short_keys(list(axes))
    names, whole = [], []
    for point in itertools.product(*axes.values()):
        text = "-".join(f"{key}={value}" for key, value in zip(short, point, strict=True))
        whole.append(text)
        names.append(re.sub(r"[^\w.+=-]+", "_", text))
    if len(set(names)) < len(names) or any(len(name.encode()) > LONGEST for name in names):
        names = [
            f"{name[: LONGEST // 2]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            for name, text in zip(names, whole, strict=True)
        ]
    return names


def _base(path: str, fixed: Sequence[str], axes: dict[str, list[str]]) -> str:
    """The name of the sweep: that of the configuration."""
    first = [f"{key}={values[0]}" for key, values in axes.items()]
    return load(path, [*fixed, *first], training=True).name


def _short_keys(keys: list[str]) -> list[str]:
    """Keys by their last parts, as many as tell them apart."""
    found = []
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            short = ".".join(parts[-count:])
            if sum(f".{one}".endswith(f".{short}") for one in keys) == 1:
                break
        found.append(short)
    return found


def _values(key: str, text: str) -> list[str]:
    """The values of a word, as they were typed."""
    text = text.strip()
    if match := _RANGE.fullmatch(text):
        return _range(key, *match.groups())
    if re.match(r"(log|lin)\(", text):
        raise ConfigError(
            f"{key}: given {text}; allowed: log(from,to,how many), as in log(1e-5,1e-3,5), or lin."
        )
    values = _split(key, text)
    if len(values) > 1 and not all(values):
        raise ConfigError(f"{key}: given {text}; a value between two commas is empty.")
    return values


def _split(key: str, text: str) -> list[str]:
    """Text at its commas, but for those in brackets and quotes."""
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
    """Whether a quote after some text opens a quoted one, unlike that in `it's`."""
    return not before or bool(closing and before[-1] in "[{(,:")


def _range(key: str, kind: str, *texts: str) -> list[str]:
    try:
        low, high, count = float(texts[0]), float(texts[1]), int(texts[2])
    except ValueError:
        raise ConfigError(
            f"{key}: given {kind}({','.join(texts)}), which are no numbers."
        ) from None
    if not (math.isfinite(low) and math.isfinite(high)) or not 2 <= count <= MOST_RUNS:
        raise ConfigError(f"{key}: {kind}(from,to,how many): allowed: 2 or more finite values.")
    if low == high or (kind == "log" and min(low, high) <= 0):
        above = " above 0" if kind == "log" else ""
        raise ConfigError(f"{key}: {kind}({','.join(texts)}): allowed: two different ends{above}.")
    shares = [step / (count - 1) for step in range(count)]
    if kind == "log":
        found = [math.exp(math.log(low) * (1 - one) + math.log(high) * one) for one in shares]
    else:
        found = [low * (1 - one) + high * one for one in shares]
    return [f"{value:.6g}" for value in found]
