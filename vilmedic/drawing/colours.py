"""Colours of labels and series, the same in every figure and page."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

# After Okabe and Ito (2008), distinguishable with every common colour vision. Purple and olive
# replace their yellow and black: they are readable on white and on a dark background.
COLOURS = ("#2f7fc1", "#e69f00", "#1fa67a", "#d55e00", "#8e6bd1", "#cc79a7", "#56b4e9", "#a3923a")
SHAPES = ("o", "^", "s", "D", "P", "v", "X", "*")
"""From the ninth label on the shape changes."""
REST = "#b4bbc5"
"""Colour of references for comparison."""

_USUAL = {
    **{"train": 0, "validate": 1, "test": 2},
    **{"loss": 0, "validation_loss": 1, "train_loss": 6},
    **{"visual": 0, "linguistic": 1, "auroc": 0, "average_precision": 1, "accuracy": 2},
}


def label_colour(place: int) -> str:
    """The colour of a label.

    Args:
        place: index of the label among all labels of the data, also if a figure shows only some.
    """
    return COLOURS[place % len(COLOURS)]


def label_shape(place: int) -> str:
    """Return the matplotlib marker of a label; see `label_colour`."""
    return SHAPES[place // len(COLOURS) % len(SHAPES)]


def series_colours(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Choose a colour for each series by its name: the same in every panel, and in most runs.

    Usual names have a fixed colour. Any other name starts at a colour given by its characters and
    takes the next one that is free in its panel, so that up to eight series of a panel differ.

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
