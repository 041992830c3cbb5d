"""Plots of numbers with intervals along a setting."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from vilmedic.drawing.colours import label_shape, series_colours

COLUMNS = 3
MOST_TICKS = 8
APART = 0.012  # share of the width between the intervals of two lines at one place
DECADE = 10  # from this ratio of the ends on, an axis is logarithmic


@dataclass(frozen=True)
class Series:
    """A line of a panel.

    Args:
        name: what the legend calls it.
        places: on the horizontal axis, ascending.
        values: one a place.
        intervals: lower and upper end of each value; None if unknown.
    """

    name: str
    places: Sequence[float]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]


@rc_context({"text.parse_math": False})  # names may hold dollar signs
def draw_intervals(panels: Mapping[str, Sequence[Series]], *, along: str, title: str) -> bytes:
    """Draw a panel for each number, with a line and its intervals for each series.

    Args:
        panels: the series of each panel, by its title; at least one.
        along: name of the horizontal axis.
        title: title of the figure.

    Returns:
        A PNG file.
    """
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.2 + 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(one.name for panel in panels.values() for one in panel))
    colours, handles = series_colours([names]), {}
    for axis, (name, series) in zip(axes, panels.items(), strict=False):
        places = sorted({place for one in series for place in one.places})
        _scale(axis, places)
        for one in series:
            shift = APART * (names.index(one.name) - (len(names) - 1) / 2)
            beside = _beside(one.places, (places[0], places[-1]), shift)
            look = (colours[one.name], label_shape(names.index(one.name)))
            handles[one.name] = _draw(axis, one, beside, *look)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlabel(along, fontsize=9)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.2)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if len(names) > 1:
        figure.legend(
            handles=[handles[name] for name in names],
            labels=names,
            loc="outside lower left",
            frameon=False,
            fontsize=9,
        )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def _logarithmic(low: float, high: float) -> bool:
    return low > 0 and high >= DECADE * low


def _scale(axis: Axes, places: Sequence[float]) -> None:
    """An axis with the places as its ticks, logarithmic where they span a decade."""
    if _logarithmic(places[0], places[-1]):
        axis.set_xscale("log")
    if len(places) <= MOST_TICKS:
        axis.xaxis.set_major_locator(FixedLocator(places))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _beside(places: Sequence[float], ends: tuple[float, float], shift: float) -> list[float]:
    """Shift places by a share of the axis, so that the intervals of two lines do not overlap."""
    low, high = ends
    if _logarithmic(low, high):
        return [place * (high / low) ** shift for place in places]
    return [place + (high - low) * shift for place in places]


def _draw(
    axis: Axes, series: Series, places: Sequence[float], colour: str, shape: str
) -> ErrorbarContainer:
    """Draw a line with its intervals."""
    bounds = zip(series.values, series.intervals, strict=True)
    ends = [(value, value) if one is None else one for value, one in bounds]
    below = [value - low for value, (low, _) in zip(series.values, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(series.values, ends, strict=True)]
    return axis.errorbar(
        places,
        series.values,
        yerr=[below, above],
        color=colour,
        marker=shape,
        markersize=4,
        linewidth=1.3,
        capsize=3,
        elinewidth=1.1,
    )
