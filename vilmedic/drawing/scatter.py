"""Scatter plots of labelled points, fit for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

# Okabe and Ito (2008), told apart with every common colour vision; the yellow, faint on white,
# is left out. From the ninth class on the shape changes.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#999999")
SHAPES = ("o", "^", "s", "D", "P", "v", "X", "*")
LONGEST_COLUMN = 16


@rc_context({"text.parse_math": False})  # labels may hold dollar signs
def draw_scatter(
    path: Path,
    points: NDArray[np.float32],
    classes: NDArray[np.int64],
    names: Sequence[str],
    *,
    title: str,
    caption: str,
    axes: tuple[str, str],
) -> None:
    """Draw points in the colours of their classes, with a legend beside the picture.

    Points are drawn in a random but fixed order, so that no class hides the others.

    Args:
        path: the PNG file to write.
        points: [N, 2].
        classes: the class of each point, a position in `names`, [N].
        names: the classes; colours follow their order, and those without points are listed too.
        title: what is shown.
        caption: where it comes from, in small print under the title.
        axes: names of the two axes.
    """
    columns = 1 + (len(names) - 1) // LONGEST_COLUMN
    figure = Figure(figsize=(7.2 + 1.8 * (columns - 1), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    order = np.random.default_rng(0).permutation(len(points))
    colours = np.array([COLOURS[k % len(COLOURS)] for k in range(len(names))])
    shapes = np.array([SHAPES[k // len(COLOURS) % len(SHAPES)] for k in range(len(names))])
    # Shapes, unlike colours, need some size to be told apart.
    area = float(np.clip(9000 / len(points), 5 if len(names) <= len(COLOURS) else 14, 46))
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
        xytext=(0, 36),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=12,
        fontweight="bold",
    )
    counts = np.bincount(classes, minlength=len(names))
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=shapes[k],
            color=colours[k],
            markersize=7,
            label=f"{name} ({counts[k]:,})",
        )
        for k, name in enumerate(names)
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
