"""Result tables and headline metrics of the report page."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vilmedic.checkpoints.left_out import LeftOut, read_json
from vilmedic.comparison.resampled import resampled
from vilmedic.evaluation.evaluations import FOLDER, read_index
from vilmedic.evaluation.predictions import predictions_name, read_predictions
from vilmedic.evaluation.results import headline, number_name, protocol_names, source
from vilmedic.files import spreadsheet_text

NONE = "-"  # where there is no number
RESAMPLES = 1000
MOST_RESAMPLED = 50_000  # samples of a split of which intervals are computed here

HEADLINES = {
    "retrieval": ("image_to_text_r5", "text_to_image_r5"),
    "classification": ("auroc", "f1"),
    "pointing_game": ("side", "box"),
    "prompted_findings": ("auroc", "accuracy"),
    "reconstruction": ("hard_loss", "codes_used"),
}
"""The numbers of a protocol that the page opens with; of others, the first."""


class Cell(NamedTuple):
    """A number as it is shown and as it is.

    Args:
        text: the number.
        interval: its confidence interval, for small print.
        value: the number itself; None for text and for none.
        bounds: the interval itself.
    """

    text: str
    interval: str = ""
    value: float | None = None
    bounds: tuple[float, float] | None = None


@dataclass
class Table:
    """Rows of numbers of one metric.

    Args:
        title: the protocol.
        columns: the systems, or the numbers of a class.
        rows: the name of each row and its cells.
        details: whether it is folded away at first.
        file: name of the CSV file.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    details: bool = False
    file: str = "table"

    @property
    def bounded(self) -> bool:
        """Whether any number has an interval."""
        return any(cell.bounds for _, cells in self.rows for cell in cells)

    @property
    def csv(self) -> str:
        """The table as a data URI of a CSV file, with all digits and a column for each bound."""
        bounded = [any(cells[k].bounds for _, cells in self.rows) for k in range(len(self.columns))]
        head = [""]
        for column, more in zip(self.columns, bounded, strict=True):
            head += [column, f"{column}, lower", f"{column}, upper"] if more else [column]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(map(spreadsheet_text, head))
        for name, cells in self.rows:
            line: list[str] = [name]
            for cell, more in zip(cells, bounded, strict=True):
                text = "" if cell.text == NONE else cell.text
                line.append(text if cell.value is None else repr(cell.value))
                line += [repr(one) for one in cell.bounds or ()] or ["", ""] if more else []
            writer.writerow(map(spreadsheet_text, line))
        return f"data:text/csv;base64,{base64.b64encode(stream.getvalue().encode()).decode()}"


@dataclass
class Results:
    """Content of the page about one split.

    Args:
        split: name of the split.
        samples: its size.
        data: name of the data; empty where the file does not say it.
        source: what was evaluated: system, epoch and seed.
        headline: the numbers that count, of the system and the baselines.
        tables: all numbers.
        protocols: the name of each protocol, by that in the file.
        values: the file itself.
        folder: where it lies.
    """

    split: str
    samples: int
    data: str
    source: str
    headline: Table
    tables: list[Table]
    protocols: dict[str, str]
    values: dict[str, Any]
    folder: Path


def read_results(run_dir: Path, left_out: LeftOut | None = None) -> list[Results]:
    """The results files of a run directory, `test` first.

    Args:
        run_dir: the directory.
        left_out: takes the files that cannot be read.
    """
    left_out = left_out or LeftOut(run_dir)
    found = []
    for path in sorted(run_dir.glob("results_*.json"), key=_order):
        with left_out.damaged(path):
            found.append(_results(read_json(path), run_dir, left_out))
    return found


def _order(path: Path) -> tuple[int, str]:
    known = ["results_test", "results_validate"]
    return (known.index(path.stem) if path.stem in known else len(known), path.stem)


def _results(content: dict[str, Any], run_dir: Path, left_out: LeftOut) -> Results:
    used, system, split = content["models_used"], content.get("system", "model"), content["split"]
    if type(content["samples"]) is not int or not isinstance(split, str):
        raise ValueError("its split is no name, or its number of samples no number")
    path = run_dir / predictions_name(split)
    if path.exists():
        with left_out.damaged(path):
            _add_intervals(content, path)
    systems = {system if used == 1 else f"ensemble of {used}": content}
    systems |= {name.replace("_", " "): one for name, one in content["baselines"].items()}
    known = content.get("protocols") or {}
    names = protocol_names({name: known.get(name) or {} for name in content["metrics"]})
    tables = [_loss(systems)]
    first_rows: list[tuple[str, list[Cell]]] = []
    for metric, name in names.items():
        values = {one: each["metrics"].get(metric) or {} for one, each in systems.items()}
        found = _metric(name, values)
        tables += found
        first = next(iter(values.values()))
        for key in _headline_keys(metric, first):
            cells = [_cell(each, key) for each in values.values()]
            first_rows.append((f"{name}: {number_name(key)}", cells))
    for table in tables:
        table.file = _file(run_dir, split, table.title)
    file = _file(run_dir, split, "headline")
    return Results(
        split=split,
        samples=content["samples"],
        data=str(content.get("data") or ""),
        source=source(system, content["checkpoints"], ema=content.get("ema", False)),
        headline=Table("headline", list(systems), first_rows or tables[0].rows, file=file),
        tables=[table for table in tables if table.rows],
        protocols=names,
        values=content,
        folder=run_dir,
    )


def _file(run_dir: Path, split: str, title: str) -> str:
    """The name of a file that is downloaded."""
    words = re.sub(r"[^\w.]+", "-", f"{run_dir.resolve().name}-{split}-{title}")
    return words.strip("-")[:100]


def _headline_keys(metric: str, values: dict[str, Any]) -> list[str]:
    kind = re.sub(r"_\d+$", "", metric)
    numbers = [key for key, value in values.items() if _is_number(value)]
    chosen = [key for key in HEADLINES.get(kind, ()) if key in numbers]
    return chosen or numbers[:1]


def _add_intervals(content: dict[str, Any], path: Path) -> None:
    """Add the 95% intervals of numbers that follow from what a protocol says of each sample.

    Retrieval is reported without; the ranks of all samples give them.
    """
    if content["samples"] > MOST_RESAMPLED:
        return
    arrays = read_predictions(path)
    if len(arrays["lines"]) != content["samples"]:
        return  # of another evaluation
    ranks = {key: one for key, one in arrays.items() if key.endswith(("_above", "_beside"))}
    drawn = resampled(ranks | {"lines": arrays["lines"]}, headline(content), number=RESAMPLES)
    for name, sample in drawn.items():
        metric, _, key = name.partition(" ")
        bounds = np.percentile(sample, [2.5, 97.5]).tolist()
        content["metrics"][metric].setdefault(f"{key}_interval", bounds)


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
    """Return the column of one evaluation in the table of evaluations."""
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
    rows = [(name, [_value(column.get(name)) for column in columns]) for name in names]
    return Table("all evaluations", folders, rows, file="evaluations")


def _value(value: Any) -> Cell:
    if isinstance(value, str):
        return Cell(value)
    return Cell(shown(value), value=value if _is_number(value) else None)


def _loss(systems: dict[str, Any]) -> Table:
    cells = [_value(system.get("loss")) for system in systems.values()]
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
            rows.append((number_name(key), cells))
        elif isinstance(some[0], dict):
            plain = "by class" if key == "classes" else key.replace("_", " ")
            inner += _classes(f"{title}: {plain}", some[0])
    return [Table(title, list(values), rows), *inner]


def _classes(title: str, classes: dict[str, Any]) -> list[Table]:
    """A table with one row per class; of the model alone: baselines would need a third axis."""
    if all(_is_number(value) or value is None for value in classes.values()):
        rows = [(str(name), [_value(value)]) for name, value in classes.items()]
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
    return [Table(title, [number_name(key) for key in columns], rows, details=True)]


def _cell(values: dict[str, Any], key: str) -> Cell:
    bounds, value = values.get(f"{key}_interval"), values.get(key)
    whole = isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds))
    if not whole or not bounds:
        return _value(value)
    low, high = bounds
    return _value(value)._replace(interval=f"{shown(low)} to {shown(high)}", bounds=(low, high))


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
        return NONE
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
