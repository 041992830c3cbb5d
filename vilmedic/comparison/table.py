"""Comparison tables: a row per setting, a column per metric; as text, LaTeX, CSV or HTML.

`compare` makes it from run directories, `text_of` writes it.
"""

from __future__ import annotations

import csv
import html
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vilmedic.comparison.runs import (
    Run,
    group,
    is_number,
    other_sample,
    read_runs,
    trained_twice,
    varying,
    what_differs,
)
from vilmedic.comparison.statistics import Array, Difference, Estimate, differences, estimate
from vilmedic.config.declared import known_better
from vilmedic.errors import ConfigError
from vilmedic.evaluation.results import fitting
from vilmedic.files import spreadsheet_text, text_table
from vilmedic.log import columns as terminal_columns
from vilmedic.log import counted

RESAMPLES = 1000
MOST_RESAMPLED = 100
"""Most runs that are resampled by default: listing a thousand then takes a second."""
BEST = "better than every other setting beyond chance (p < 0.05, Holm)"


@dataclass(frozen=True)
class Cell:
    """A cell: a metric of a setting.

    Args:
        estimate: the estimate; None if the setting has none.
        difference: the difference to the best of its column; None for the best, and without
            predictions and seeds.
        bold: whether it is significantly the best.
    """

    estimate: Estimate | None
    difference: Difference | None = None
    bold: bool = False


@dataclass(frozen=True)
class Column:
    """A column: a metric of all settings.

    Args:
        name: the metric and the number, such as `zero_shot auroc`.
        better: `higher`, `lower`, or None if neither.
        cells: one per setting.
        best: index of the best setting; None without a comparison.
    """

    name: str
    better: str | None
    cells: list[Cell]
    best: int | None


@dataclass(frozen=True)
class Comparison:
    """Content of a comparison table.

    Args:
        split: name of the split.
        samples: its size, of the first run.
        settings: the name of each row and its runs.
        columns: the numbers.
        notes: notes for the reader, such as why runs are not comparable.
    """

    split: str
    samples: int
    settings: dict[str, list[Run]]
    columns: list[Column]
    notes: list[str]


def compare(
    directories: Sequence[Path],
    *,
    split: str | None = None,
    by: Sequence[str] = (),
    anyway: bool = False,
    number: int | None = None,
) -> Comparison:
    """Compare evaluated runs; loads no model.

    Args:
        directories: of the runs.
        split: see `read_runs`.
        by: see `group`.
        anyway: compare incomparable runs, without those that were not evaluated; the table notes
            it.
        number: resamples per interval; 0 leaves out intervals and differences that need them. None
            takes 1,000, or 0 for more than 100 runs.

    Raises:
        ConfigError: a directory is no evaluated run, the runs cannot be compared, or `number` is 1.
    """
    if number == 1:
        raise ConfigError("--bootstrap: given 1, which has no spread; allowed: 0, or integer >= 2.")
    left_out: list[str] = []
    split, runs = read_runs(directories, split, left_out if anyway else None)
    problems = [*what_differs(runs), *trained_twice(runs)]
    if problems and not anyway:
        remedy = "Nothing is compared; --anyway compares them and notes it in the table."
        raise ConfigError([*(f"{one}." for one in problems), remedy])
    settings = group(runs, by)
    notes = [f"left out: {one}" for one in left_out]
    notes += [f"not comparable: {one}" for one in problems]
    for label, some in settings.items() if by else ():
        if keys := varying(some):
            notes.append(f"{label}: {len(some)} runs, which also differ in {', '.join(keys)}")
    if number is None:
        number = RESAMPLES if len(runs) <= MOST_RESAMPLED else 0
        if not number:
            notes.append(
                f"more than {MOST_RESAMPLED} runs: no samples are drawn; --bootstrap {RESAMPLES} "
                "draws them"
            )
    drawn = _drawn(runs, number)
    columns = []
    for name in dict.fromkeys(key for run in runs for key in run.numbers):
        better = _better(split, name)
        if better is not None or len(settings) == 1:
            columns.append(_column(name, better, list(settings.values()), drawn))
    known = [column for column in columns if any(cell.estimate for cell in column.cells)]
    notes += _gaps(known, settings)
    return Comparison(split, runs[0].results["samples"], settings, known, notes)


def text_of(comparison: Comparison, form: str) -> str:
    """A comparison as text.

    Args:
        comparison: what is shown.
        form: `table`, `md`, `latex`, `csv` or `html`.
    """
    return _FORMS[form](comparison)


def rows(comparison: Comparison, bold: Callable[[str], str]) -> list[list[str]]:
    """Return the cells of the table: a header, and a row per setting."""
    arrows = {"higher": " ↑", "lower": " ↓", None: ""}
    table = [["setting", "seeds", *(one.name + arrows[one.better] for one in comparison.columns)]]
    for place, (label, runs) in enumerate(comparison.settings.items()):
        cells = [column.cells[place] for column in comparison.columns]
        table.append([label, str(len(runs)), *(_shown(cell, bold) for cell in cells)])
    return table


def difference_rows(comparison: Comparison) -> list[list[str]]:
    """Return the differences to the best as a header and rows; empty without any."""
    labels, table = list(comparison.settings), []
    for column in comparison.columns:
        for label, cell in zip(labels, column.cells, strict=True):
            if (one := cell.difference) is not None and column.best is not None:
                low, high = (_number(bound, sign=True) for bound in one.interval)
                row = [column.name, label, labels[column.best], _number(one.value, sign=True)]
                verdict = "significant" if one.significant else "not significant"
                table.append([*row, f"[{low}, {high}]", _chance(one.corrected), verdict])
    head = ["number", "setting", "best", "difference", "95% interval", "p (Holm)", ""]
    return [head, *table] if table else []


def caption(comparison: Comparison) -> str:
    """Describe the table in one sentence."""
    runs = sum(map(len, comparison.settings.values()))
    settings = len(comparison.settings)
    return (
        f"split {comparison.split}: {counted(comparison.samples, 'sample')}, "
        f"{counted(runs, 'run')}, {counted(settings, 'setting')}"
    )


def footnotes(comparison: Comparison) -> list[str]:
    """Notes on the runs, and what the notation of the table means."""
    return [*comparison.notes, *notation(comparison)]


def notation(comparison: Comparison) -> list[str]:
    """Explain the notation of the table."""
    cells = [cell for column in comparison.columns for cell in column.cells if cell.estimate]
    found = []
    if any(cell.estimate and cell.estimate.seeds > 1 for cell in cells):
        found.append("mean ± standard deviation over the seeds")
    if intervals := interval_note(comparison):
        found.append(f"[{intervals}]")
    if any(cell.bold for cell in cells):
        found.append(f"marked as best: {BEST}")
    if difference_rows(comparison):
        found.append(
            f"differences: {_compared(comparison.columns)}; intervals of each comparison alone, "
            "p corrected for all pairs of settings of a column"
        )
    lacking = [
        column.name
        for column in comparison.columns
        if column.best is not None and all(cell.difference is None for cell in column.cells)
    ]
    if lacking:
        found.append(f"not tested, for lack of values of single samples: {', '.join(lacking)}")
    return found


def _gaps(columns: Sequence[Column], settings: dict[str, list[Run]]) -> list[str]:
    """Return notes on metrics that some runs of a setting lack: the mean is over the others."""
    return [
        f"{label}: {column.name} is that of {cell.estimate.seeds} of {len(runs)} runs; the others "
        "have no such number"
        for column in columns
        for cell, (label, runs) in zip(column.cells, settings.items(), strict=True)
        if cell.estimate is not None and cell.estimate.seeds < len(runs)
    ]


def _compared(columns: Sequence[Column]) -> str:
    """Describe the basis of the differences: the same samples, or seeds alone."""
    paired: list[str] = []
    apart: list[str] = []
    for column in columns:
        if column.best is None or not any(cell.difference for cell in column.cells):
            continue
        estimates = [cell.estimate for cell in column.cells if cell.difference is not None]
        best = column.cells[column.best].estimate
        known = all(one is not None and one.draws is not None for one in [best, *estimates])
        (paired if known else apart).append(column.name)
    if not apart:
        return "paired on the same samples"
    seeds = f"between seeds alone for {', '.join(apart)}" if paired else "between seeds alone"
    return f"paired on the same samples, {seeds}" if paired else seeds


def interval_note(comparison: Comparison) -> str:
    """Describe the sources of the intervals; empty without any."""
    estimates = [cell.estimate for column in comparison.columns for cell in column.cells]
    over = sorted({one.over for one in estimates if one is not None and one.over})
    return f"95% interval over {'; over '.join(over)}" if over else ""


def _drawn(runs: Sequence[Run], number: int) -> dict[int, dict[str, Array]]:
    """The numbers of each run in the same resamples, of runs with the samples of the first."""
    if number < 2 or not any(run.predictions for run in runs):
        return {id(run): {} for run in runs}
    from vilmedic.comparison.resampled import resampled  # brings what 1,000 listed runs need not

    first = next(run.predictions for run in runs if run.predictions)
    found: dict[int, dict[str, Array]] = {}
    for run in runs:
        alike = run.predictions and other_sample(run.predictions, first) is None
        found[id(run)] = resampled(run.predictions, run.numbers, number=number) if alike else {}
    return found


def _column(
    name: str,
    better: str | None,
    settings: Sequence[Sequence[Run]],
    drawn: dict[int, dict[str, Array]],
) -> Column:
    estimates: list[Estimate | None] = []
    for runs in settings:
        having = [run for run in runs if is_number(run.numbers.get(name))]
        values = [float(run.numbers[name]) for run in having]
        draws = [drawn[id(run)].get(name) for run in having]
        known = _interval(having[0], name) if having else None
        estimates.append(estimate(values, draws, known) if having else None)
    there = [place for place, one in enumerate(estimates) if one is not None]
    if better is None or len(there) < 2:
        return Column(name, better, [Cell(one) for one in estimates], None)
    compared = [one for one in estimates if one is not None]
    sign = 1 if better == "higher" else -1
    chosen = max(range(len(compared)), key=lambda place: sign * compared[place].value)
    found = dict(zip(there, differences(compared, chosen), strict=True))
    best = there[chosen]
    others = [found[place] for place in there if place != best]
    bold = all(one is not None and one.significant for one in others)
    cells = [
        Cell(one, found.get(place), bold and place == best) for place, one in enumerate(estimates)
    ]
    return Column(name, better, cells, best)


def _interval(run: Run, name: str) -> tuple[float, float] | None:
    """The interval that the evaluation of a run states for a number."""
    metric, _, key = name.partition(" ")
    values = run.results["metrics"].get(metric)
    bounds = values.get(f"{key}_interval") if isinstance(values, dict) else None
    if isinstance(bounds, list) and len(bounds) == 2 and all(map(is_number, bounds)):
        return float(bounds[0]), float(bounds[1])
    return None


def _better(split: str, name: str) -> str | None:
    return known_better(f"{split}_{name.replace(' ', '_')}")


def _number(value: float, *, sign: bool = False) -> str:
    places = 1 if abs(value) >= 100 else 3
    return f"{value:{'+' if sign else ''}.{places}f}"


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _shown(cell: Cell, bold: Callable[[str], str]) -> str:
    if cell.estimate is None:
        return "-"
    one, text = cell.estimate, _number(cell.estimate.value)
    text = bold(text) if cell.bold else text
    if one.spread is not None:
        text += f" ± {_number(one.spread)}"
    if one.interval is not None:
        text += f" [{_number(one.interval[0])}, {_number(one.interval[1])}]"
    return text


# -- output formats


def _as_table(comparison: Comparison) -> str:
    """Return text as wide as the terminal: columns that do not fit follow in further blocks."""
    cells, width = rows(comparison, lambda text: f"*{text}"), terminal_columns()
    parts = [caption(comparison), ""]
    for part in fitting(cells, width):
        parts += [*text_table([[row[0], *row[1:][part]] for row in cells], "   "), ""]
    if found := difference_rows(comparison):
        head, *lines = text_table([_gap_cells(row) for row in found], "   ")
        parts += ["Differences to the best", "", head]
        for (number, best), some in groupby(
            zip(found[1:], lines, strict=True), lambda pair: (pair[0][0], pair[0][2])
        ):
            parts += [f"{number}, to {best}", *(line for _, line in some)]
        parts.append("")
    for note in footnotes(comparison):
        parts += [note] if width is None else textwrap.wrap(note, width)
    return "\n".join(parts).rstrip()


def _gap_cells(row: Sequence[str]) -> list[str]:
    """Return what differs between the rows of a number, out of a row of differences."""
    _, setting, _, *numbers = row
    return [f"  {setting}", *numbers]


def _as_markdown(comparison: Comparison) -> str:
    def lines(table: Sequence[Sequence[str]]) -> list[str]:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
        head, *body = [f"| {' | '.join(row)} |" for row in escaped]
        return [head, "|---" * len(table[0]) + "|", *body]

    parts = [caption(comparison), "", *lines(rows(comparison, lambda text: f"**{text}**"))]
    if found := difference_rows(comparison):
        parts += ["", "Differences to the best:", "", *lines(found)]
    notes = footnotes(comparison)
    return "\n".join([*parts, *(line for note in notes for line in ("", f"- {note}"))])


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "<": "$<$",
    ">": "$>$",
}


def _as_latex(comparison: Comparison) -> str:
    def escaped(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text)

    marks = ("\x02", "\x03")  # not part of any name; set before the text between them is escaped

    def cell(text: str) -> str:
        return escaped(text).replace(marks[0], r"\textbf{").replace(marks[1], "}")

    def lines(table: Sequence[Sequence[str]], text_columns: int) -> list[str]:
        layout = "l" * text_columns + "r" * (len(table[0]) - text_columns)
        head, *body = [" & ".join(map(cell, row)) + r" \\" for row in table]
        return [
            f"\\begin{{tabular}}{{{layout}}}",
            r"\hline",
            head,
            r"\hline",
            *body,
            r"\hline",
            r"\end{tabular}",
        ]

    parts = [f"% {caption(comparison)}"]
    parts += [f"% {note}" for note in footnotes(comparison)]
    parts += lines(rows(comparison, lambda text: marks[0] + text + marks[1]), 1)
    if found := difference_rows(comparison):
        parts += ["", "% Differences to the best", *lines(found, 3)]
    return "\n".join(parts)


def _as_csv(comparison: Comparison) -> str:
    head = ["setting", "seeds"]
    for column in comparison.columns:
        ends = ("", " sd", " low", " high", " difference", " difference low", " difference high")
        head += [f"{column.name}{end}" for end in (*ends, " p holm", " best")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for place, (label, runs) in enumerate(comparison.settings.items()):
        row: list[Any] = [spreadsheet_text(label), len(runs)]
        for column in comparison.columns:
            cell = column.cells[place]
            one, gap = cell.estimate, cell.difference
            row += [one.value, one.spread, *(one.interval or ("", ""))] if one else [""] * 4
            row += [gap.value, *gap.interval, gap.corrected] if gap else [""] * 4
            row.append(int(cell.bold))
        writer.writerow(row)
    return out.getvalue().rstrip("\n")


def _as_html(comparison: Comparison) -> str:
    marks = ("\x02", "\x03")

    def cell(text: str) -> str:
        return html.escape(text).replace(marks[0], "<b>").replace(marks[1], "</b>")

    def lines(table: Sequence[Sequence[str]], title: str) -> list[str]:
        head, *body = table
        made = [f"<table>\n<caption>{html.escape(title)}</caption>"]
        made.append(f"<thead><tr>{''.join(f'<th>{cell(one)}</th>' for one in head)}</tr></thead>")
        made.append("<tbody>")
        for first, *others in body:
            cells = "".join(f"<td>{cell(one)}</td>" for one in others)
            made.append(f'<tr><th scope="row">{cell(first)}</th>{cells}</tr>')
        return [*made, "</tbody>", "</table>"]

    def listed(notes: Sequence[str]) -> list[str]:
        items = [f"<li>{html.escape(note)}</li>" for note in notes]
        return ["<ul>", *items, "</ul>"] if items else []

    parts = listed(comparison.notes)  # before the numbers: why they may not be compared
    parts += lines(rows(comparison, lambda text: marks[0] + text + marks[1]), caption(comparison))
    if found := difference_rows(comparison):
        parts += lines(found, "Differences to the best")
    return "\n".join([*parts, *listed(notation(comparison))])


_FORMS: dict[str, Callable[[Comparison], str]] = {
    "table": _as_table,
    "md": _as_markdown,
    "latex": _as_latex,
    "csv": _as_csv,
    "html": _as_html,
}
FORMS = tuple(_FORMS)
