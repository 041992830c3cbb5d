"""Plot of a comparison: numbers along a key of the configuration, with their intervals.

Along `dataset.fraction` it shows label efficiency: a line for each encoder, a point for each part
of the labels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vilmedic.comparison.runs import lines_along
from vilmedic.comparison.table import Comparison, caption, interval_note
from vilmedic.drawing.intervals import Series, draw_intervals
from vilmedic.errors import ConfigError, visible
from vilmedic.files import replace_bytes

MOST_LINES = 20


def write_plot(comparison: Comparison, key: str, by: Sequence[str] = ()) -> Path:
    """Draw the numbers of a comparison along a key, in the folder that holds the runs.

    Args:
        comparison: the comparison: one panel per metric, one point per setting.
        key: dotted key of the configuration, whose values are numbers.
        by: the keys that the comparison was grouped by, if any.

    Returns:
        The figure, `comparison_<last part of the key>.png`.

    Raises:
        ConfigError: a row has no or several numbers for the key, or there are too many lines.
        OSError: the figure cannot be written.
    """
    panels = series_along(comparison, key, by)
    note = interval_note(comparison)
    title = "\n".join(visible(line) for line in (caption(comparison), note) if line)
    picture = draw_intervals(panels, along=visible(key), title=title)
    runs = [run for some in comparison.settings.values() for run in some]
    folder = Path(os.path.commonpath([run.directory.resolve().parent for run in runs]))
    path = folder / f"comparison_{key.rpartition('.')[2]}.png"
    replace_bytes(path, picture)
    return path


def series_along(
    comparison: Comparison, key: str, by: Sequence[str] = ()
) -> dict[str, list[Series]]:
    """The lines of each number along a key; see `write_plot`."""
    settings = list(comparison.settings)
    lines = lines_along(comparison.settings, key, by)
    if len(lines) > MOST_LINES:
        raise ConfigError(
            f"--plot: the rows make {len(lines)} lines along {key}; allowed: at most {MOST_LINES}. "
            "Give fewer runs, or --by with the key and those that make a line."
        )
    panels = {}
    for column in comparison.columns:
        found = []
        for name, points in lines.items():
            cells = [(place, column.cells[settings.index(row)].estimate) for place, row in points]
            known = [(place, one) for place, one in cells if one is not None]
            if known:
                values = [one.value for _, one in known]
                intervals = [one.interval for _, one in known]
                found.append(Series(name, [place for place, _ in known], values, intervals))
        if found:
            panels[column.name] = found
    return panels
