"""The comparison page `comparison.html`: curves and results of several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from vilmedic.checkpoints.left_out import check_run
from vilmedic.comparison.table import compare, text_of
from vilmedic.errors import ConfigError, visible
from vilmedic.files import replace_text
from vilmedic.report.curves import MATTER, Line, Panel, arrange, line_labels, read_curves
from vilmedic.report.page import packed_panels, plotly, templates

PAGE = "comparison.html"
MOST_LINES = 60  # in a figure


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Make the page of several runs, in the folder that holds them.

    Args:
        run_dirs: their directories; runs without results have curves only.

    Returns:
        The page.

    Raises:
        ConfigError: one is not the directory of a run.
        OSError: the page cannot be written.
    """
    for run_dir in run_dirs:
        check_run(run_dir)
    table, reason = _table(run_dirs)
    panels = overlaid({visible(name): read_curves(one) for name, one in _names(run_dirs).items()})
    page = (
        templates()
        .get_template("comparison.html")
        .render(
            names=[visible(name) for name in _names(run_dirs)],
            table=Markup(table),
            reason=reason,
            panels=packed_panels(panels),
            folded=sum(panel.folded for panel in panels),
            plotly=plotly() if panels else "",
        )
    )
    path = Path(os.path.commonpath([one.resolve().parent for one in run_dirs])) / PAGE
    replace_text(path, page)
    return path


def overlaid(curves: dict[str, list[Line]]) -> list[Panel]:
    """A figure for each number, with a line for each run and seed that logged it.

    They stand in the order of the curves of one run; all but the first are folded.

    Args:
        curves: the lines of each run, by its name.
    """
    found: dict[str, list[Line]] = {}
    for run, lines in curves.items():
        for line in lines:
            overlay = found.setdefault(line.name, [])
            if len(overlay) < MOST_LINES:
                overlay.append(Line(run, line.seed, line.steps, line.values))
    panels = []
    for group in arrange(Line(name, 0) for name in found):
        names = [line.name for line in group.lines]
        for name, label in zip(names, line_labels(names), strict=True):
            title = group.title if len(names) == 1 else f"{group.title}: {label}"
            panels.append(replace(group, title=title, lines=found[name]))
    for panel in panels[MATTER:]:
        panel.folded = True
    return panels


def _names(run_dirs: Sequence[Path]) -> dict[str, Path]:
    """A name for each run: that of its folder, or the path where two are the same."""
    short = [one.resolve().name for one in run_dirs]
    same = len(set(short)) < len(short)
    return {str(one) if same else name: one for name, one in zip(short, run_dirs, strict=True)}


def _table(run_dirs: Sequence[Path]) -> tuple[str, str]:
    """The table of the runs as HTML, or why there is none."""
    try:
        return text_of(compare(run_dirs, anyway=True), "html"), ""
    except ConfigError as error:
        return "", " ".join(error.problems)
