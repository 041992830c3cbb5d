"""Colours of labels and series, the same in every figure and page."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

# After Okabe and Ito (2008), told apart with every common colour vision. Their yellow and black are
# replaced by purple and olive: the same colours are read on white and on the dark ground of a page.
COLOURS = ("#2f7fc1", "#e69f00", "#1fa67a", "#d55e00", "#8e6bd1", "#cc79a7", "#56b4e9", "#a3923a")
SHAPES = ("o", "^", "s", "D", "P", "v", "X", "*")
"""From the ninth label on the shape changes."""
REST = "#b4bbc5"
"""Of what is only there to be compared with."""

_USUAL = {
    **{"train": 0, "validate": 1, "test": 2},
    **{"loss": 0, "validation_loss": 1, "train_loss": 6},
    **{"visual": 0, "linguistic": 1, "auroc": 0, "average_precision": 1, "accuracy": 2},
}


def label_colour(place: int) -> str:
    """The colour of a label.

    Args:
        place: of the label among all labels of the data, no matter which of them a figure shows.
    """
    return COLOURS[place % len(COLOURS)]


def label_shape(place: int) -> str:
    """The shape of a label's points, as matplotlib names it; see `label_colour`."""
    return SHAPES[place // len(COLOURS) % len(SHAPES)]


def series_colours(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """A colour for each series by its name: the same in every panel, and in most runs.

    The usual names have a place of their own. Any other begins at a place that follows from its
    letters and takes the next one that is free among the series it is drawn with, so that up to
    eight of a panel differ.

    Args:
        groups: the names of the series of each panel.
    """
    places: dict[str, int] = {}
    for names in groups:
        taken = {places[name] for name in names if name in places}
        for name in names:
            if name in places:
                continue
            wanted = _USUAL.get(name, zlib.crc32(name.encode()) % len(COLOURS))
            steps = [(wanted + step) % len(COLOURS) for step in range(len(COLOURS))]
            places[name] = next((one for one in steps if one not in taken), wanted)
            taken.add(places[name])
    return {name: COLOURS[place] for name, place in places.items()}
