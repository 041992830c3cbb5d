from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vilmedic.post_processing.heat_maps import Sample, draw_heat_maps, overlay

WHOLE = (0.0, 0.0, 1.0, 1.0)


def one_hot_map(row: int, column: int, side: int = 4) -> torch.Tensor:
    found = torch.zeros(side, side)
    found[row, column] = 1.0
    return found


def test_the_hottest_region_is_the_brightest() -> None:
    grey = np.full((80, 80), 0.3, dtype=np.float32)
    tinted = overlay(grey, one_hot_map(3, 0) * 16, WHOLE, peak=16.0)
    assert tinted.shape == (80, 80, 3)
    brightness = tinted.sum(axis=2)
    corners = brightness[[10, 10, 70, 70], [10, 70, 10, 70]]
    assert corners.argmax() == 2
    assert corners[2] > 2 * corners[1]
    np.testing.assert_allclose(tinted[10, 10], tinted[10, 70])


def test_the_map_covers_what_the_model_saw() -> None:
    grey = np.full((80, 40), 1.0, dtype=np.float32)
    tinted = overlay(grey, torch.ones(4, 4), (0.0, 0.25, 1.0, 0.75), peak=3.0)
    np.testing.assert_allclose(tinted[:20], 0.35)
    np.testing.assert_allclose(tinted[60:], 0.35)
    assert np.ptp(tinted[20:60].reshape(-1, 3), axis=0).max() < 1e-6
    assert tinted[40, 20].std() > 0.05  # coloured


def test_dollar_signs_are_no_formula(tmp_path: Path) -> None:
    words = ["a", "${", "$b$"]
    sample = Sample(
        picture=torch.zeros(1, 8, 8, dtype=torch.uint8),
        window=WHOLE,
        report="a ${ b $c$",
        words=words,
        attention=torch.full((3, 2, 2), 0.25),
    )
    draw_heat_maps(tmp_path / "map.png", sample, title="$x{", caption="of $ y {")
    assert Image.open(tmp_path / "map.png").size[0] > 100


def test_draws_any_number_of_words(tmp_path: Path) -> None:
    sizes = []
    for words in (1, 7, 30):
        path = tmp_path / f"{words}.png"
        sample = Sample(
            picture=torch.full((1, 50, 40), 90, dtype=torch.uint8),
            window=(0.1, 0.1, 0.9, 0.9),
            report="Word " * words,
            words=["pneumothorax-with-a-long-name"] * words,
            attention=torch.stack([one_hot_map(0, 0)] * words),
        )
        draw_heat_maps(path, sample, title="title", caption="caption")
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels < 250).any(axis=2).mean() > 0.1
        sizes.append(pixels.shape)
    assert len({size[1] for size in sizes}) == 1
    assert sizes[0][0] <= sizes[1][0] < sizes[2][0]


def test_colour_pictures_are_drawn_grey(tmp_path: Path) -> None:
    sample = Sample(
        picture=torch.randint(0, 255, (3, 700, 900), dtype=torch.uint8),
        window=WHOLE,
        report="A report.",
        words=["one", "two"],
        attention=torch.full((2, 19, 19), 1 / 361),
    )
    draw_heat_maps(tmp_path / "a.png", sample, title="title", caption="caption")
    assert (tmp_path / "a.png").stat().st_size > 10_000
