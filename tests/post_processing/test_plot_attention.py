from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.made_up_evaluations import evaluation, random, split_features
from tests.pairs_on_disk import REPORTS, gloria_evaluation
from vilmedic.drawing.colours import label_colour
from vilmedic.errors import ConfigError, DataError
from vilmedic.post_processing import plot_attention
from vilmedic.post_processing.plot_attention import (
    COLUMNS,
    GRID,
    HEAD,
    SIDE,
    PlotAttention,
    Sample,
    arranged,
    draw_heat_maps,
    overlay,
)

WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record what would be drawn instead of drawing."""
    calls: list[dict[str, Any]] = []

    def note(path: Path, sample: Any, **texts: str) -> None:
        calls.append({"path": path, "sample": sample, **texts})

    monkeypatch.setattr(plot_attention, "draw_heat_maps", note)
    return calls


def test_draws_the_first_samples(tmp_path: Path) -> None:
    files = PlotAttention(num_samples=2)(gloria_evaluation(tmp_path))
    assert [path.name for path in files] == ["test_attention_0.png", "test_attention_1.png"]
    for path in files:
        with Image.open(path) as picture:
            assert min(picture.size) > 500


def test_words_are_drawn_with_their_maps(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    run = gloria_evaluation(tmp_path)
    PlotAttention(samples=[4, 0, 4])(run)
    assert [call["path"].name for call in drawn] == ["test_attention_4.png", "test_attention_0.png"]
    sample = drawn[1]["sample"]
    assert sample.report == REPORTS[0]
    words = run.dataset.words(REPORTS[0])
    maps = run.attention([0])
    assert maps is not None
    shown = [n for n, word in enumerate(words[:-1]) if n > 0 and word != "."]
    assert list(sample.words) == [words[n] for n in shown]
    assert sample.words[:4] == ["Small", "left", "pleural", "effusion"]
    torch.testing.assert_close(sample.attention, maps[0][shown])
    assert sample.window == pytest.approx((0, 0.1, 1, 0.9))
    data = tmp_path.name
    assert drawn[1]["title"] == f"Where words look: {data}, test split, line 1: Effusion"
    assert drawn[1]["caption"].startswith("run, GLoRIA, of 1")


def test_an_ensemble_is_named_in_the_title(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    PlotAttention(num_samples=1)(gloria_evaluation(tmp_path, models=2))
    assert drawn[0]["caption"].startswith("run, GLoRIA, of 2")


def test_maps_that_cannot_be_drawn_are_logged(
    tmp_path: Path, drawn: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    run = gloria_evaluation(tmp_path)
    broken = [torch.full((9, 4, 4), torch.nan)]
    run.networks.local = SimpleNamespace(attention=lambda *_: broken)  # type: ignore[assignment]
    assert PlotAttention(num_samples=1)(run) == []
    assert "maps of sample 0 are not finite" in caplog.text
    run.networks.local = SimpleNamespace(attention=lambda *_: None)  # type: ignore[assignment]
    assert PlotAttention(num_samples=1)(run) == []
    assert "no words or no regions on the split 'test'" in caplog.text
    assert not drawn


def test_bad_options_are_refused(tmp_path: Path) -> None:
    run = gloria_evaluation(tmp_path)
    PlotAttention(samples=[4]).check(run)
    with pytest.raises(ConfigError, match=r"samples: given 5.*Allowed: integer from 0 to 4"):
        PlotAttention(samples=[0, 5]).check(run)
    plain = evaluation(split_features({"visual": random(2, 3)}))
    plain.networks.members = [lambda: torch.nn.Linear(1, 1)]
    with pytest.raises(ConfigError, match=r"^Linear compares no words"):
        PlotAttention().check(plain)


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


def test_the_map_covers_the_model_input() -> None:
    grey = np.full((80, 40), 1.0, dtype=np.float32)
    tinted = overlay(grey, torch.ones(4, 4), (0.0, 0.25, 1.0, 0.75), peak=3.0)
    np.testing.assert_allclose(tinted[:20], 0.35)
    np.testing.assert_allclose(tinted[60:], 0.35)
    assert np.ptp(tinted[20:60].reshape(-1, 3), axis=0).max() < 1e-6
    assert tinted[40, 20].std() > 0.05  # coloured


def test_dollar_signs_are_not_parsed_as_math(tmp_path: Path) -> None:
    words = ["a", "${", "$b$"]
    sample = Sample(
        image=torch.zeros(1, 8, 8, dtype=torch.uint8),
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
            image=torch.full((1, 50, 40), 90, dtype=torch.uint8),
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
    assert sizes[0][1] < sizes[1][1] <= sizes[2][1]
    assert sizes[0][0] <= sizes[1][0] < sizes[2][0]


@pytest.mark.parametrize("aspect", [0.8, 1.0, 1.25])
def test_heat_maps_fill_their_width(aspect: float) -> None:
    height = SIDE * aspect + 0.5
    for words in range(1, 60):
        columns, panel = arranged(words, aspect, height)
        rows = -(-words // columns)
        assert columns <= min(COLUMNS, words)
        assert rows * columns - words < rows  # at most one empty place per row
        assert columns * panel <= GRID + 1e-9
        wide = columns * panel > 0.95 * GRID
        assert wide or rows * (panel * aspect + HEAD) > 0.95 * height


def test_boxes_are_drawn_if_the_data_have_them(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    run = gloria_evaluation(tmp_path)
    box = [0.5, 0.4, 0.8, 0.9]
    record = {"Effusion": {"side": "left", "parts": [{"box": box}]}}
    folder = Path(run.dataset.lines([0])[0].rpartition(":")[0]).parent
    text = "".join(json.dumps(record if k == 1 else {}) + "\n" for k in range(5))
    (folder / "test.finding.jsonl").write_text(text)
    PlotAttention(num_samples=2)(run)
    assert drawn[0]["sample"].boxes == []
    place = list(run.features.label_names).index("Effusion")
    assert drawn[1]["sample"].boxes == [("Effusion", tuple(box), label_colour(place))]
    assert drawn[1]["caption"].endswith("boxes: where findings are")
    (folder / "test.finding.jsonl").write_text("{\n" * 5)
    with pytest.raises(DataError, match="not a record of findings"):
        PlotAttention().check(run)
    with pytest.raises(DataError, match="nowhere"):
        PlotAttention(root=str(tmp_path / "nowhere")).check(run)


def test_colour_images_are_drawn_grey(tmp_path: Path) -> None:
    sample = Sample(
        image=torch.randint(0, 255, (3, 700, 900), dtype=torch.uint8),
        window=WHOLE,
        report="A report.",
        words=["one", "two"],
        attention=torch.full((2, 19, 19), 1 / 361),
    )
    draw_heat_maps(tmp_path / "a.png", sample, title="title", caption="caption")
    assert (tmp_path / "a.png").stat().st_size > 10_000
