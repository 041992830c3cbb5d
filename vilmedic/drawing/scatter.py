"""Scatter plots of labelled points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from vilmedic.drawing.colours import COLOURS, REST, label_colour, label_shape

LONGEST_COLUMN = 16


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
    columns = 1 + (len(listed) + bool(len(rest)) - 1) // LONGEST_COLUMN
    figure = Figure(figsize=(7.2 + 1.8 * (columns - 1), 4.8), layout="constrained")
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
    axis.set_title(caption, loc="left", fontsize=8.5, color="#444444")
    axis.annotate(
        title,
        (0, 1),
        xytext=(0, 23 + 13 * caption.count("\n")),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=12,
        fontweight="bold",
    )
    entries = [(f"{names[k]} ({counts[k]:,})", colours[k], shapes[k]) for k in listed]
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
