from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from vilmedic.drawing import scatter
from vilmedic.drawing.scatter import COLOURS, SHAPES, draw_scatter


def draw(path: Path, classes: np.ndarray, names: list[str], seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(len(classes), 2)).astype(np.float32)
    draw_scatter(path, points, classes, names, title="t", caption="c", axes=("x", "y"))
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def pixels_of(picture: np.ndarray, colour: str) -> int:
    wanted = np.array(to_rgb(colour)) * 255
    # Points are drawn with opacity 0.8 on white; those of the legend are opaque.
    blended = 0.8 * wanted + 0.2 * 255
    near = [np.abs(picture - target).max(axis=2) <= 2 for target in (wanted, blended)]
    return int((near[0] | near[1]).sum())


def test_every_class_has_its_colour(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", np.arange(60) % 3, ["A", "B", "C"])
    for colour in COLOURS[:3]:
        assert pixels_of(picture, colour) > 1000
    assert pixels_of(picture, COLOURS[4]) == 0


def test_a_class_without_points_keeps_its_place_in_the_legend(tmp_path: Path) -> None:
    with_all = draw(tmp_path / "a.png", np.zeros(40, int), ["A", "B"])
    assert 0 < pixels_of(with_all, COLOURS[1]) < 2000


def test_many_classes_differ_in_shape_and_widen_the_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = draw(tmp_path / "few.png", np.arange(40) % 8, [f"class {k}" for k in range(8)])
    shapes: list[str] = []
    original = scatter.Line2D

    def spy(*args: object, **options: object) -> object:
        shapes.append(str(options["marker"]))
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(scatter, "Line2D", spy)
    many = draw(tmp_path / "many.png", np.arange(200) % 20, [f"class {k}" for k in range(20)])
    assert shapes == [SHAPES[0]] * 8 + [SHAPES[1]] * 8 + [SHAPES[2]] * 4
    assert many.shape[1] > few.shape[1]


def test_the_same_points_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, np.arange(30) % 2, ["A", "B"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
