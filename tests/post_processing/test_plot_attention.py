from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.evaluations import evaluation, random, split_features
from tests.reading import REPORTS, gloria_evaluation
from vilmedic.errors import ConfigError
from vilmedic.post_processing import plot_attention
from vilmedic.post_processing.plot_attention import PlotAttention


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be drawn, instead of pictures."""
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


def test_words_stand_with_their_maps(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    run = gloria_evaluation(tmp_path)
    PlotAttention(samples=[4, 0, 4])(run)
    assert [call["path"].name for call in drawn] == ["test_attention_4.png", "test_attention_0.png"]
    sample = drawn[1]["sample"]
    assert sample.report == REPORTS[0]
    words = run.dataset.words(REPORTS[0])
    maps = run.attention([0])
    assert maps is not None
    shown = [n for n, word in enumerate(words[:-1]) if word != "."]
    assert list(sample.words) == [words[n] for n in shown]
    assert sample.words[1:5] == ["Small", "left", "pleural", "effusion"]
    torch.testing.assert_close(sample.attention, maps[0][shown])
    assert sample.window == pytest.approx((0, 0.1, 1, 0.9))
    assert drawn[1]["title"] == "test, line 1: Effusion"
    assert drawn[1]["caption"] == "run, GLoRIA, of 1"


def test_an_ensemble_says_so(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    PlotAttention(num_samples=1)(gloria_evaluation(tmp_path, models=2))
    assert drawn[0]["caption"] == "run, GLoRIA, of 2"


def test_what_cannot_be_drawn_is_said(
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
    with pytest.raises(ConfigError, match=r"samples: given 5.*has 5 samples\. Allowed: 0 to 4"):
        PlotAttention(samples=[0, 5]).check(run)
    plain = evaluation(split_features({"visual": random(2, 3)}))
    plain.networks.members = [lambda: torch.nn.Linear(1, 1)]
    with pytest.raises(ConfigError, match="plot_attention: Linear compares no words"):
        PlotAttention().check(plain)
