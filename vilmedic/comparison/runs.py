"""Evaluated runs read from their directories: configuration, seed, metrics, protocols, samples."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilmedic.checkpoints.left_out import check_run, read_json
from vilmedic.config.yaml_source import read_file_text, read_yaml
from vilmedic.errors import ConfigError, DataError, nearest, visible
from vilmedic.evaluation.evaluations import FOLDER, RECORD
from vilmedic.evaluation.predictions import predictions_name, read_predictions
from vilmedic.evaluation.results import headline, results_name
from vilmedic.files import plain_name
from vilmedic.log import counted
from vilmedic.loggers.contract import flat

IGNORED = re.compile(
    r"name|ckpt_dir|ckpt|dataset\.fraction_seed|"
    r"trainor\.(seed|loggers|log_every|profile|save_every|keep|keep_states)|"
    r"(.+\.)?(device|tf32|num_workers|cache|spool|spool_gib)|ensemblor\..+"
)
"""Keys in which runs of one setting may differ: they change trained weights only by chance."""
OF_EVALUATION = ("seed", "batch_size", "precision")
"""Fields of an evaluation that its numbers depend on, besides the protocol options."""
LISTED = 5  # keys and runs named in a message
LARGEST = 1e100  # larger numbers, and their squares, cannot be compared


@dataclass(frozen=True)
class Run:
    """A run with one seed, evaluated on one split.

    Args:
        directory: its directory.
        seeds: of the evaluated checkpoints, one but for ensembles.
        config: dotted keys of its configuration and their values.
        results: what `results_<split>.json` holds.
        folder: the folder of the evaluation.
    """

    directory: Path
    seeds: tuple[Any, ...]
    config: dict[str, Any]
    results: dict[str, Any]
    folder: Path

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """The headline numbers, as in `zero_shot auroc`; null where one is undefined."""
        return headline(self.results)

    @cached_property
    def predictions(self) -> dict[str, NDArray[Any]]:
        """The predictions for each sample; empty if they were not written."""
        path = self.folder / predictions_name(self.results["split"])
        arrays = read_predictions(path) if path.exists() else {}
        if arrays and (wrong := _wrong_arrays(arrays, self.results["samples"])):
            raise DataError(f"{path}: {wrong}.")
        return arrays

    @cached_property
    def setting(self) -> dict[str, Any]:
        """Everything that identifies its setting: the configuration except name and seed."""
        own = {key: value for key, value in self.config.items() if not IGNORED.fullmatch(key)}
        own |= {f"changed.{key}": str(v) for key, v in (self.results.get("changed") or {}).items()}
        own["ema"] = self.results.get("ema", False)
        own["models_used"] = self.results["models_used"]
        return own

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """All that its numbers depend on besides the model: protocol options, seed, precision.

        A file named by an option is compared by its content if the evaluation recorded it.
        """
        record = self.folder / RECORD
        known = self.results.get("protocols") or {}
        if record.is_file():
            try:
                known = _read(record)["settings"].get("protocols", known)
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise ConfigError(f"{record}: cannot be read: {error}.") from None
        own = dict(flat({"protocols": known}))
        own = {key: one for key, one in own.items() if f"{key}_sha256" not in own}
        own |= {key: self.results.get(key) for key in OF_EVALUATION}
        return own | {"tf32": self.results.get("tf32", False)}

    def classes(self, metric: str) -> list[str] | None:
        """The classes that a metric was measured on; None for one without."""
        values = self.results["metrics"].get(metric)
        classes = values.get("classes") if isinstance(values, dict) else None
        return list(classes) if isinstance(classes, dict) and classes else None


def read_runs(
    directories: Sequence[Path], split: str | None, left_out: list[str] | None = None
) -> tuple[str, list[Run]]:
    """The evaluated runs of some directories.

    The newest evaluation of a split counts. Where several seeds were trained in one directory, the
    newest evaluation of each seed counts.

    Args:
        directories: of the runs.
        split: name of the split; None takes `test` where all have it, else one that all have.
        left_out: takes a message for each run without an evaluation on the split, if others have
            one. Without this list such a run is refused.

    Returns:
        The split and the runs, in the order of the directories.

    Raises:
        ConfigError: a directory is no run, or was not evaluated on the split; all that is wrong.
    """
    problems: list[str] = []
    there: dict[Path, list[str]] = {}
    places: dict[str, Path] = {}  # a directory that is given by two paths is one run
    for directory in directories:
        places.setdefault(os.path.realpath(directory), directory)
    for directory in places.values():
        try:
            check_run(directory)
        except ConfigError as error:
            problems += error.problems
            continue
        there[directory] = _splits(directory)
    if problems:
        raise ConfigError(problems)
    evaluated = {one: splits for one, splits in there.items() if splits}
    chosen = split or _common(there if left_out is None else evaluated)
    lacking = [one for one, splits in there.items() if chosen not in splits]
    tolerated = left_out is not None and len(lacking) < len(there)
    for directory in lacking:
        has = f"only of {', '.join(there[directory])}" if there[directory] else "of no split"
        (left_out if left_out is not None and tolerated else problems).append(
            f"{directory}: there are results {has}, not of {chosen}. Evaluate it first: "
            f"bin/ensemble.py {_config_of(directory)} ensemblor.splits=[{chosen}]."
        )
    there = {one: splits for one, splits in there.items() if chosen in splits}
    runs: list[Run] = []
    for directory in there if not problems else ():
        try:
            runs += _runs(directory, chosen)
        except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{directory}: its results of {chosen} cannot be read: {error}.")
    if problems:
        raise ConfigError(problems)
    return chosen, runs


def what_differs(runs: Sequence[Run]) -> list[str]:
    """Return the differences that make runs incomparable, each once, with its runs.

    Args:
        runs: all that are compared, the first one with each of the others.
    """
    first = runs[0]
    found: dict[str, list[str]] = {}

    def note(what: str, run: Run) -> None:
        found.setdefault(what, []).append(str(run.directory))

    for run in runs[1:]:
        for what in _differences(first, run):
            note(what, run)
    return [f"{_listed(names)} and {first.directory}: {what}" for what, names in found.items()]


def trained_twice(runs: Sequence[Run]) -> list[str]:
    """Return messages about runs of one setting with the same seed: their spread is no variance.

    Args:
        runs: all that are compared.
    """
    known: dict[str, Run] = {}
    found: dict[str, list[str]] = {}
    for run in runs:
        seeds = [run.seeds, run.config.get("dataset.fraction_seed")]
        key = json.dumps([seeds, run.setting], sort_keys=True, default=str)
        first = known.setdefault(key, run)
        if first is not run:
            found.setdefault(str(first.directory), []).append(str(run.directory))
    return [
        f"{_listed(others)} and {first}: the same setting with the same seed"
        for first, others in found.items()
    ]


def is_number(value: Any) -> bool:
    """Return whether a value is a number that can be compared."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) < LARGEST


def group(runs: Sequence[Run], by: Sequence[str] = ()) -> dict[str, list[Run]]:
    """Group runs by setting, each with a label of its differences to the others.

    Args:
        runs: the runs.
        by: dotted keys of the configuration: runs with the same values are one row, even if other
            keys differ. Without any, runs that differ only in name and seed are one row.

    Raises:
        ConfigError: no run has such a key.
    """
    for key in by:
        if not any(_under(run.config, key) for run in runs):
            known = {name for run in runs for name in run.config}
            raise ConfigError(f"--by: no run has the key '{key}'.{nearest(key, sorted(known))}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        own: Any = [_under(run.config, key) for key in by] if by else run.setting
        groups.setdefault(json.dumps(own, sort_keys=True, default=str), []).append(run)
    settings = list(groups.values())
    return dict(zip(_labels(settings, by), settings, strict=True))


def lines_along(
    settings: Mapping[str, Sequence[Run]], key: str, by: Sequence[str] = ()
) -> dict[str, list[tuple[float, str]]]:
    """Group settings that differ in one key only, as lines along it.

    Args:
        settings: as `group` gives them.
        key: dotted key of the configuration, whose values are numbers.
        by: as `group` was given.

    Returns:
        A name for each line, none for a single one; the places on it, ascending, and the setting
        at each.

    Raises:
        ConfigError: a setting has no number there or several.
    """
    lines: dict[str, list[tuple[float, str]]] = {}
    firsts: dict[str, list[Run]] = {}
    for label, runs in settings.items():
        known = {name for run in runs for name in run.config}
        values: list[Any] = []
        values += (one for run in runs if (one := run.config.get(key)) not in values)
        if key not in known:
            raise ConfigError(f"--plot: {label}: has no key '{key}'.{nearest(key, sorted(known))}")
        value = values[0]
        if len(values) > 1 or not is_number(value):
            raise ConfigError(
                f"--plot: {label}: given {key}={visible(_listed([str(one) for one in values]))}; "
                "allowed: a key with a number as its value, the same in all runs of a row."
            )
        names = [name for name in by if name != key] if by else [*runs[0].setting]
        source = runs[0].config if by else runs[0].setting
        own = [_under(source, name) for name in names if name != key]
        line = json.dumps(own, sort_keys=True, default=str)
        lines.setdefault(line, []).append((float(value), label))
        firsts.setdefault(line, list(runs))
    labels = _labels(list(firsts.values()), [name for name in by if name != key], left_out=key)
    labels = labels if len(lines) > 1 else [""]
    return {name: sorted(lines[line]) for name, line in zip(labels, firsts, strict=True)}


def varying(runs: Sequence[Run]) -> list[str]:
    """Keys of the settings in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.setting)
    missing = object()
    return [
        key
        for key in keys
        if any(
            run.setting.get(key, missing) != runs[0].setting.get(key, missing) for run in runs[1:]
        )
    ]


def _labels(settings: Sequence[Sequence[Run]], by: Sequence[str], left_out: str = "") -> list[str]:
    """Name each setting by its differences, or by a run if there are too many."""
    if by:
        return [", ".join(_say(one[0].config, key) for key in by) for one in settings]
    firsts = [one[0] for one in settings]
    keys = [key for key in varying(firsts) if key != left_out]
    if len(firsts) > 1 and len(keys) <= LISTED:
        labels = [
            ", ".join(_say(run.setting, key) for key in keys if key in run.setting)
            for run in firsts
        ]
    else:
        labels = [
            one[0].directory.name
            if len(one) == 1
            else f"{one[0].directory.name} and {len(one) - 1} more"
            for one in settings
        ]
    if len(set(labels)) < len(labels) or "" in labels:
        labels = [str(one.directory) for one in firsts]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({number})" for number, label in enumerate(labels, start=1)]
    return labels


def _say(config: dict[str, Any], key: str) -> str:
    under = _under(config, key)
    value = under.get(key, under) if under else "not set"
    short = key.rpartition(".")[2]
    return visible(f"{short}={value}")


def _under(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The value of a key, or those of the keys inside it."""
    return {
        name: value for name, value in config.items() if name == key or name.startswith(f"{key}.")
    }


def _differences(first: Run, run: Run) -> Iterator[str]:
    a, b = first.protocol, run.protocol
    shared = set(first.results["metrics"]) & set(run.results["metrics"])
    for key in dict.fromkeys([*a, *b]):
        root, _, rest = key.partition(".")
        if root == "protocols" and rest.partition(".")[0] not in shared:
            continue
        if a.get(key) != b.get(key):
            yield f"{key} differs: {b.get(key)} and {a.get(key)}"
    for metric in sorted(shared):
        own, other = run.classes(metric), first.classes(metric)
        if own is not None and other is not None and own != other:
            only = sorted(set(own) ^ set(other))
            named = f"in {_listed(only)}" if only else "in their order"
            yield f"the labels of {metric} differ, {named}"
    if run.results["samples"] != first.results["samples"]:
        counts = f"{run.results['samples']} and {first.results['samples']}"
        yield f"the sample lists differ: {counts} samples"
        return
    mine, theirs = run.predictions, first.predictions
    if not mine or not theirs:
        return
    place = other_sample(mine, theirs)
    if place is not None:
        yield f"the sample lists differ, first in '{_sample(mine, place)}' and " + (
            f"'{_sample(theirs, place)}'"
        )
        return
    own, other = (one["label_names"].tolist() for one in (mine, theirs))
    if own == other and "labels" in mine and "labels" in theirs:
        odd = (mine["labels"] != theirs["labels"]).any(axis=1).sum()
        if odd:
            yield f"the labels of {counted(odd, 'sample')} differ"


def other_sample(one: Mapping[str, NDArray[Any]], two: Mapping[str, NDArray[Any]]) -> int | None:
    """Return the index of the first sample that differs between two runs; None without any.

    Samples are identified by their line and image names; the folders may differ.
    """
    if len(one["lines"]) != len(two["lines"]):
        return min(len(one["lines"]), len(two["lines"]))
    differ = one["lines"] != two["lines"]
    for place in map(int, np.flatnonzero((one["images"] != two["images"]) | differ)):
        if differ[place] or _images(one, place) != _images(two, place):
            return place
    return None


def _images(arrays: Mapping[str, NDArray[Any]], place: int) -> list[str]:
    return [path.rpartition("/")[2] for path in str(arrays["images"][place]).split(",")]


def _sample(arrays: Mapping[str, NDArray[Any]], place: int) -> str:
    return f"line {arrays['lines'][place]}: {', '.join(_images(arrays, place))}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"


def _splits(directory: Path) -> list[str]:
    names = [path.stem.removeprefix("results_") for path in directory.glob(results_name("*"))]
    return sorted(names)


def _common(there: dict[Path, list[str]]) -> str:
    shared = set.intersection(*map(set, there.values())) if there else set()
    if not shared or "test" in shared:
        return "test"
    return "validate" if "validate" in shared else min(shared)


def _config_of(directory: Path) -> str:
    path = next(iter(sorted(directory.glob("config_*.yml"))), None)
    return str(path) if path is not None else "config.yml"


def _runs(directory: Path, split: str) -> list[Run]:
    """The runs of a directory, with the newest evaluation of each seed."""
    newest = _results(directory / results_name(split))
    found = {_seeds(newest): (newest, _folder(directory, newest))}
    configs = {path.stem.removeprefix("config_"): path for path in directory.glob("config_*.yml")}
    if len(configs) > 1 and newest["models_used"] == 1:
        others = [
            (str(_read(path.parent / RECORD).get("date")), path)
            for path in directory.glob(f"{FOLDER}/*/{results_name(split)}")
            if (path.parent / RECORD).is_file()
        ]
        for _, path in sorted(others, reverse=True):
            results = _results(path)
            alike = results["models_used"] == 1 and results.get("ema") == newest.get("ema")
            if alike and _seeds(results) not in found:
                found[_seeds(results)] = (results, path.parent)
    return [
        Run(directory, seeds, _config(configs, seeds, folder), results, folder)
        for seeds, (results, folder) in sorted(found.items(), key=lambda one: str(one[0]))
    ]


def _results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: it was not written by an evaluation.
    """
    content = _read(path)
    kinds = {"metrics": dict, "checkpoints": list, "samples": int, "models_used": int, "split": str}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path.name}: {key} is missing or of another kind")
    if not all(isinstance(one, dict) for one in content["metrics"].values()) or not all(
        isinstance(content.get(key, {}) or {}, dict) for key in ("protocols", "changed")
    ):
        raise ValueError(f"{path.name}: a metric or a protocol is no mapping")
    checkpoints = content["checkpoints"]
    if not checkpoints or not all(
        isinstance(one, dict) and isinstance(one.get("seed"), int | None) for one in checkpoints
    ):
        raise ValueError(f"{path.name}: does not say which seeds its checkpoints have")
    if path.name != results_name(content["split"]):
        raise ValueError(f"{path.name}: is of another split, '{visible(content['split'])}'")
    if min(content["samples"], content["models_used"]) < 1:
        raise ValueError(f"{path.name}: is of no samples or no model")
    return {"loss": None, **content}


def _config(configs: dict[str, Path], seeds: tuple[Any, ...], folder: Path) -> dict[str, Any]:
    """Return the configuration of a seed's training; without one, that of the evaluation."""
    path = configs.get(str(seeds[0])) or next(iter(configs.values()), None)
    if path is not None:
        return {
            key: value
            for part in re.split(r"^(?=[^\s#-])", read_file_text(str(path)), flags=re.M)
            for key, value in _section(part, path.name).items()
        }
    record = folder / RECORD
    settings = _read(record)["settings"] if record.is_file() else {}
    return dict(flat({key: settings[key] for key in ("dataset", "model") if key in settings}))


@cache
def _section(text: str, file: str) -> dict[str, Any]:
    """The keys of a top-level section; most are the same in all runs and read once."""
    content, _ = read_yaml(text, lambda line: file)
    return dict(flat(content or {}))


def _folder(directory: Path, results: dict[str, Any]) -> Path:
    name = results.get("evaluation")
    return directory / FOLDER / plain_name(name) if isinstance(name, str) and name else directory


def _wrong_arrays(arrays: Mapping[str, NDArray[Any]], samples: int) -> str:
    """Return why arrays are not predictions of a number of samples; empty if they are."""
    for name in ("lines", "images", "label_names"):
        if name not in arrays:
            return f"lacks the array {name}"
    for name, value in arrays.items():
        protocol, _, last = name.rpartition("/")
        shape: tuple[int, ...] = (samples,)
        if name == "version":
            continue
        if name == "label_names" or last in ("classes", "thresholds"):
            shape = value.shape[:1]
        elif name == "labels":
            shape = (samples, arrays["label_names"].size)
        elif last == "scores":
            classes = arrays.get(f"{protocol}/classes")
            shape = (samples, -1 if classes is None else classes.size)
        elif name not in ("lines", "images") and not last.endswith(("_above", "_beside")):
            continue  # of a later metric or a plugin
        if not shape or value.shape != shape:
            expected = " x ".join(map(str, shape or ("any number",)))
            return (
                f"{name} is {' x '.join(map(str, value.shape)) or 'a single value'}, not {expected}"
            )
        if protocol and last != "classes" and value.dtype.kind not in "biuf":
            return f"{name} holds no numbers"
    return ""


def _seeds(results: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(one.get("seed") for one in results["checkpoints"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except RecursionError:
        raise ValueError(f"{path.name} nests too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return content
