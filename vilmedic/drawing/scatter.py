"""Scatter plots of labelled points."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from vilmedic.drawing.colours import COLOURS, REST, label_colour, label_shape

LONGEST_COLUMN = 16
LONGEST_NAME = 28  # letters of a row of the legend, of which an entry has two at most
TITLE, CAPTION = 8.6, 12.5  # letters of a row per inch


@rc_context({"text.parse_math": False})  # labels may hold dollar signs
def draw_scatter(
    path: Path,
    points: NDArray[np.float32],
    classes: NDArray[np.int64],
    names: Sequence[str],
    *,
    places: Sequence[int] | None = None,
    title: str,
    caption: str,
    axes: tuple[str, str],
) -> None:
    """Draw points in the colours of their classes, with a legend beside the plot.

    Points are drawn in a random but fixed order, so that no class hides the others. Points without
    a class are grey and below them.

    Args:
        path: the PNG file to write.
        points: [N, 2].
        classes: the class of each point, a position in `names`, [N]; -1 for none of them.
        names: the classes, in the order of the legend, which lists those that have points.
        places: of the classes among all labels of the data, which give each its colour and shape;
            None for their order here.
        title: title of the figure.
        caption: origin of the data, in small print below the title.
        axes: names of the two axes.
    """
    places = range(len(names)) if places is None else places
    counts = np.bincount(classes[classes >= 0], minlength=len(names))
    listed = np.flatnonzero(counts).tolist()
    rest = np.flatnonzero(classes < 0)
    texts = [_entry(names[k], int(counts[k])) for k in listed]
    columns = 1 + (len(listed) + bool(len(rest)) - 1) // LONGEST_COLUMN
    longest = max((len(row) for text in texts for row in text.split("\n")), default=0)
    width = 5.4 + columns * max(1.8, 0.45 + 0.075 * longest)
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    order = np.random.default_rng(0).permutation(len(points))
    order = order[classes[order] >= 0]
    colours = np.array([label_colour(place) for place in places])
    shapes = np.array([label_shape(place) for place in places])
    # Shapes, unlike colours, need some size to be distinguishable.
    one_shape = max(places, default=0) < len(COLOURS)
    area = float(np.clip(9000 / len(points), 5 if one_shape else 14, 46))
    axis.scatter(points[rest, 0], points[rest, 1], c=REST, s=0.6 * area, alpha=0.6, linewidths=0.0)
    for shape in dict.fromkeys(shapes):
        chosen = order[shapes[classes[order]] == shape]
        axis.scatter(
            points[chosen, 0],
            points[chosen, 1],
            c=colours[classes[chosen]],
            marker=shape,
            s=area,
            alpha=0.8,
            edgecolors="white",
            linewidths=0.3 if area > 8 else 0.0,
        )
    axis.set_xlabel(axes[0], fontsize=10)
    axis.set_ylabel(axes[1], fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.margins(0.04)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#888888")
    small = "\n".join(_wrapped(row, CAPTION * width) for row in caption.split("\n"))
    axis.set_title(small, loc="left", fontsize=8.5, color="#444444")
    head: dict[str, Any] = {"fontsize": 12, "fontweight": "bold", "x": 0.02, "ha": "left"}
    figure.suptitle(_wrapped(title, TITLE * width), **head)
    entries = [(text, colours[k], shapes[k]) for text, k in zip(texts, listed, strict=True)]
    entries += [(f"other samples ({len(rest):,})", REST, "o")] if len(rest) else []
    handles = [
        Line2D([], [], linestyle="none", marker=shape, color=colour, markersize=7, label=label)
        for label, colour, shape in entries
    ]
    figure.legend(
        handles=handles,
        loc="outside right center",
        frameon=False,
        fontsize=9.5,
        ncols=columns,
        handletextpad=0.3,
    )
    figure.savefig(path, dpi=200)


def _entry(name: str, count: int) -> str:
    """An entry of the legend: the name, of a long one the beginning, and how many there are."""
    most = 2 * LONGEST_NAME - 10
    name = name if len(name) <= most else f"{name[: most - 1].rstrip()}\u2026"
    return _wrapped(f"{name} ({count:,})", LONGEST_NAME)


def _wrapped(text: str, letters: float) -> str:
    return "\n".join(textwrap.wrap(text, int(letters)))
