from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from vilmedic.drawing.intervals import Series, draw_intervals


def drawn(monkeypatch: pytest.MonkeyPatch, panel: Sequence[Series]) -> list[Any]:
    """The drawn positions, values and bar lengths of each line of a panel."""
    calls: list[Any] = []
    original = Axes.errorbar

    def spy(self: Axes, x: Any, y: Any, yerr: Any, **look: Any) -> Any:
        calls.append((list(x), list(y), [list(one) for one in yerr], self.get_xscale()))
        return original(self, x, y, yerr=yerr, **look)

    monkeypatch.setattr(Axes, "errorbar", spy)
    draw_intervals({"auroc": panel}, along="fraction", title="t")
    return calls


def test_error_bars_span_the_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Series("a", [0.01, 0.1, 1], [0.5, 0.7, 0.9], [(0.4, 0.75), None, (0.85, 0.92)])
    ((places, values, bars, scale),) = drawn(monkeypatch, [one])
    assert places == [0.01, 0.1, 1]
    assert values == [0.5, 0.7, 0.9]
    assert np.allclose(bars, [[0.1, 0, 0.05], [0.25, 0, 0.02]])
    assert scale == "log"


def test_lines_are_offset_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Series(name, [1, 2, 3], [1, 2, 3], [None] * 3) for name in "ab"]
    first, second = drawn(monkeypatch, both)
    assert first[3] == "linear"
    assert np.allclose(np.subtract(second[0], first[0]), 0.024)
    assert np.allclose(np.add(second[0], first[0]) / 2, [1, 2, 3])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_panels_and_a_single_point(count: int) -> None:
    one = Series("costs $5_x$", [0], [0.5], [(0.4, 0.6)])
    content = draw_intervals({f"n {k}$^$": [one] for k in range(count)}, along="$k", title="$$")
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
