from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from vilmedic.drawing import scatter
from vilmedic.drawing.colours import COLOURS, REST, SHAPES, series_colours
from vilmedic.drawing.scatter import draw_scatter


def draw(
    path: Path, classes: np.ndarray, names: list[str], places: list[int] | None = None
) -> np.ndarray:
    points = np.random.default_rng(0).normal(size=(len(classes), 2)).astype(np.float32)
    texts = {"title": "t", "caption": "c"}
    draw_scatter(path, points, classes, names, places=places, axes=("x", "y"), **texts)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def pixels_of(picture: np.ndarray, colour: str) -> int:
    wanted = np.array(to_rgb(colour)) * 255
    # Points have opacity 0.8 on white; those of the legend are opaque.
    blended = 0.8 * wanted + 0.2 * 255
    near = [np.abs(picture - target).max(axis=2) <= 2 for target in (wanted, blended)]
    return int((near[0] | near[1]).sum())


def test_every_class_has_its_own_colour(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", np.arange(60) % 3, ["A", "B", "C"])
    for colour in COLOURS[:3]:
        assert pixels_of(picture, colour) > 1000
    assert pixels_of(picture, COLOURS[4]) == 0


def test_a_class_without_points_is_not_listed(tmp_path: Path) -> None:
    with_all = draw(tmp_path / "a.png", np.zeros(40, int), ["A", "B"])
    assert pixels_of(with_all, COLOURS[1]) == 0


def test_a_label_keeps_its_colour_when_others_are_omitted(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", np.arange(40) % 2, ["C", "A"], places=[2, 0])
    assert pixels_of(picture, COLOURS[2]) > 1000
    assert pixels_of(picture, COLOURS[0]) > 1000
    assert pixels_of(picture, COLOURS[1]) == 0


def test_samples_without_a_class_are_drawn_below_in_grey(tmp_path: Path) -> None:
    grey = np.array(to_rgb(REST)) * 255
    counts = []
    for classes in (np.zeros(60, int), np.where(np.arange(60) < 30, 0, -1)):
        picture = draw(tmp_path / "a.png", classes, ["A"])
        blended = 0.6 * grey + 0.4 * 255
        counts.append(int((np.abs(picture - blended).max(axis=2) <= 2).sum()))
    assert counts[0] == 0
    assert counts[1] > 500


def test_series_are_coloured_by_name() -> None:
    one = series_colours([["loss", "train_loss", "validation_loss"], ["visual", "linguistic"]])
    other = series_colours([["linguistic"], ["validation_loss", "loss"]])
    assert all(one[name] == colour for name, colour in other.items())
    many = series_colours([[f"series {k}" for k in range(8)]])
    assert len(set(many.values())) == 8


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


def test_long_names_titles_and_captions_leave_the_plot_its_place(tmp_path: Path) -> None:
    path, long = tmp_path / "a.png", "a name much longer than the name of a label should be " * 4
    usual = pixels_of(draw(path, np.arange(60) % 2, ["A", "B"]), COLOURS[0])
    points = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    texts = {"title": long, "caption": f"{long}\nc"}
    draw_scatter(path, points, np.arange(60) % 2, ["A", long], axes=("x", "y"), **texts)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels_of(picture, COLOURS[0]) > 0.9 * usual
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edges == 255).all()  # nothing is cut off


def test_the_same_points_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, np.arange(30) % 2, ["A", "B"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
