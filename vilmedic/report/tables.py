"""The results of an evaluation as tables for the page."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vilmedic.executors.evaluations import read_index
from vilmedic.executors.results import source

logger = logging.getLogger(__name__)

Cell = tuple[str, str]
"""A number and, in small print, its confidence interval."""


@dataclass
class Table:
    """Rows of numbers of one metric.

    Args:
        title: the metric.
        columns: the systems, or the numbers of a class.
        rows: the name of each row and its cells.
        details: whether it is folded away at first.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    details: bool = False


@dataclass
class Results:
    """What the page says of one split.

    Args:
        split: name of the split.
        samples: its size.
        source: what was evaluated: system, epoch and seed.
        tables: the numbers.
    """

    split: str
    samples: int
    source: str
    tables: list[Table]


def read_results(run_dir: Path) -> list[Results]:
    """The results files of a run directory; one that cannot be read is left out with a warning."""
    found = []
    for path in sorted(run_dir.glob("results_*.json"), key=_order):
        try:
            found.append(_results(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is left out of the report: %s", path, error)
    return found


def _order(path: Path) -> tuple[int, str]:
    known = ["results_validate", "results_test"]
    return (known.index(path.stem) if path.stem in known else len(known), path.stem)


def _results(content: dict[str, Any]) -> Results:
    used, system = content["models_used"], content.get("system", "model")
    systems = {system if used == 1 else f"ensemble of {used}": content}
    systems |= {name.replace("_", " "): one for name, one in content["baselines"].items()}
    tables = [_headline(systems)]
    for metric in content["metrics"]:
        values = {name: system["metrics"].get(metric) or {} for name, system in systems.items()}
        tables += _metric(metric.replace("_", " "), values)
    return Results(
        split=content["split"],
        samples=content["samples"],
        source=source(system, content["checkpoints"], ema=content.get("ema", False)),
        tables=[table for table in tables if table.rows],
    )


def read_evaluations(run_dir: Path) -> Table | None:
    """All evaluations of a run with their headline numbers, newest first; None without an index.

    The rows are the numbers of each split, the columns the evaluations.
    """
    entries = [one for one in reversed(read_index(run_dir)) if one.get("numbers")]
    columns: list[dict[str, Any]] = []
    for entry in entries:
        numbers = {
            f"{split}: {name.replace('_', ' ')}": value
            for split, systems in entry["numbers"].items()
            for name, value in systems["model"].items()
        }
        made_of = source(entry["system"], entry["checkpoints"], ema=entry["ema"])
        columns.append({"evaluated": made_of, "date": entry["date"][:16], **numbers})
        if entry["differs"]:
            differs = ", ".join(f"{key} {value}" for key, value in entry["differs"].items())
            columns[-1]["differs"] = differs
    names = dict.fromkeys(name for column in columns for name in column if name != "differs")
    if any("differs" in column for column in columns):
        names["differs"] = None  # last, as it may be long
    rows = [(name, [(_text(column.get(name)), "") for column in columns]) for name in names]
    return Table("all evaluations", [one["folder"] for one in entries], rows) if entries else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _headline(systems: dict[str, Any]) -> Table:
    cells = [(shown(system.get("loss")), "") for system in systems.values()]
    return Table("loss", list(systems), [("loss", cells)])


def _metric(title: str, values: dict[str, dict[str, Any]]) -> list[Table]:
    """The numbers of a metric beside each other, then what it says of single classes."""
    keys = list(dict.fromkeys(key for system in values.values() for key in system))
    rows = []
    inner = []
    for key in keys:
        if key.endswith("_interval"):
            continue
        some = [system.get(key) for system in values.values()]
        if any(_is_number(value) for value in some):
            cells = [_cell(system, key) for system in values.values()]
            rows.append((key.replace("_", " "), cells))
        elif isinstance(some[0], dict):
            inner += _classes(f"{title}: {key.replace('_', ' ')}", some[0])
    return [Table(title, list(values), rows), *inner]


def _classes(title: str, classes: dict[str, Any]) -> list[Table]:
    """A table with a row a class; of the model alone, since baselines would need a third axis."""
    if all(_is_number(value) or value is None for value in classes.values()):
        rows = [(str(name), [(shown(value), "")]) for name, value in classes.items()]
        return [Table(title, ["value"], rows, details=True)]
    nested = {str(name): value for name, value in classes.items() if isinstance(value, dict)}
    columns = list(
        dict.fromkeys(
            key for value in nested.values() for key, one in value.items() if _is_number(one)
        )
    )
    if not columns:
        return []
    rows = [(name, [_cell(value, key) for key in columns]) for name, value in nested.items()]
    return [Table(title, [key.replace("_", " ") for key in columns], rows, details=True)]


def _cell(values: dict[str, Any], key: str) -> Cell:
    bounds = values.get(f"{key}_interval")
    whole = isinstance(bounds, list) and len(bounds) == 2
    interval = f"{shown(bounds[0])} to {shown(bounds[1])}" if whole and bounds else ""
    return shown(values.get(key)), interval


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A number as the page writes it; a dash for none."""
    if not _is_number(value) or not math.isfinite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
