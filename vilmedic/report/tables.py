"""The results of an evaluation as tables for the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vilmedic.checkpoints.left_out import LeftOut, read_json
from vilmedic.evaluation.evaluations import FOLDER, read_index
from vilmedic.evaluation.results import source

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


def read_results(run_dir: Path, left_out: LeftOut | None = None) -> list[Results]:
    """The results files of a run directory.

    Args:
        run_dir: the directory.
        left_out: takes the files that cannot be read.
    """
    left_out = left_out or LeftOut(run_dir)
    found = []
    for path in sorted(run_dir.glob("results_*.json"), key=_order):
        with left_out.damaged(path):
            found.append(_results(read_json(path)))
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
    if type(content["samples"]) is not int or not isinstance(content["split"], str):
        raise ValueError("its split is no name, or its number of samples no number")
    return Results(
        split=content["split"],
        samples=content["samples"],
        source=source(system, content["checkpoints"], ema=content.get("ema", False)),
        tables=[table for table in tables if table.rows],
    )


def read_evaluations(run_dir: Path, left_out: LeftOut | None = None) -> Table | None:
    """All evaluations of a run with their headline numbers, newest first; None without an index.

    The rows are the numbers of each split, the columns the evaluations.

    Args:
        run_dir: the directory.
        left_out: takes the evaluations that cannot be read.
    """
    left_out = left_out or LeftOut(run_dir)
    names, columns = [], []
    for entry in reversed(read_index(run_dir, left_out)):
        if entry.get("numbers"):
            with left_out.damaged(run_dir / FOLDER / entry["folder"]):
                columns.append(_column(entry))
                names.append(entry["folder"])
    return _evaluations(names, columns) if columns else None


def _column(entry: dict[str, Any]) -> dict[str, Any]:
    """What the table of evaluations says of one."""
    column = {
        "evaluated": source(entry["system"], entry["checkpoints"], ema=entry["ema"]),
        "date": entry["date"][:16],
    }
    for split, systems in entry["numbers"].items():
        for name, value in systems["model"].items():
            column[f"{split}: {name.replace('_', ' ')}"] = value
    if entry["differs"]:
        column["differs"] = ", ".join(f"{key} {value}" for key, value in entry["differs"].items())
    return column


def _evaluations(folders: list[str], columns: list[dict[str, Any]]) -> Table:
    names = dict.fromkeys(name for column in columns for name in column if name != "differs")
    if any("differs" in column for column in columns):
        names["differs"] = None  # last, as it may be long
    rows = [(name, [(_text(column.get(name)), "") for column in columns]) for name in names]
    return Table("all evaluations", folders, rows)


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


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def shown(value: Any) -> str:
    """A number as the page writes it; a dash for none."""
    if not _is_number(value) or not _is_finite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
