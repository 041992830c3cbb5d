from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.made_up_evaluations import evaluation, random, split_features, undeclared
from tests.pairs_on_disk import FINDINGS, REPORTS, gloria_evaluation, write_pairs
from vilmedic.errors import ConfigError, DataError
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.metrics.pointing_game import Finding, PointingGame, read_findings

LEFT, RIGHT = 0, 3  # columns of a map of 4 x 4 regions


def looking(run: Evaluation, where: dict[int, tuple[int, int]]) -> Evaluation:
    """Make all words of a sample attend to one region of 4 x 4, given as row and column."""

    def attention(dataset: Any, indices: Sequence[int]) -> list[Tensor]:
        maps = []
        for index in indices:
            one = torch.full((len(dataset.words(REPORTS[index])) - 1, 4, 4), 0.01)
            one[:, where[index][0], where[index][1]] = 0.85
            maps.append(one)
        return maps

    run.networks.local = SimpleNamespace(attention=attention)  # type: ignore[assignment]
    return run


def test_counts_words_that_attend_to_their_finding(tmp_path: Path) -> None:
    """Line 1 hits its side and box, line 3 only its side, line 5 has no side and misses."""
    run = looking(gloria_evaluation(tmp_path), {0: (3, RIGHT), 2: (0, LEFT), 4: (3, RIGHT)})
    result = PointingGame(root=str(tmp_path), bootstrap=200)(run)
    assert (result["words"], result["words_with_side"]) == (3, 2)
    assert result["side"] == 1.0
    assert result["side_interval"] == [1.0, 1.0]
    assert result["box"] == pytest.approx(1 / 3)
    low, high = result["box_interval"]
    assert 0 <= low < 1 / 3 < high <= 1
    assert list(result["classes"]) == ["Pleural Effusion"]
    assert result["classes"]["Pleural Effusion"]["box"] == result["box"]
    assert PointingGame(root=str(tmp_path), bootstrap=200)(run) == result
    assert undeclared(PointingGame(root=str(tmp_path)), result) == []

    wrong = looking(run, {0: (3, LEFT), 2: (3, LEFT), 4: (0, LEFT)})
    result = PointingGame(root=str(tmp_path), bootstrap=0)(wrong)
    assert result["side"] == 0.5
    assert result["box"] == pytest.approx(2 / 3)
    assert "side_interval" not in result


def test_undecided_maps_count_as_chance(tmp_path: Path) -> None:
    """A uniform map and the middle column of three are on neither side."""
    run = gloria_evaluation(tmp_path)

    def attention(dataset: Any, indices: Sequence[int]) -> list[Tensor]:
        # Equal regions up to float32 rounding: the order of summation decides which is largest.
        even = 1 / 16 * (1 + 1e-7 * random(20, 4, 4))
        middle = torch.zeros(20, 3, 3)
        middle[:, :, 1] = 1.0
        return [even if index == 0 else middle for index in indices]

    run.networks.local = SimpleNamespace(attention=attention)  # type: ignore[assignment]
    result = PointingGame(root=str(tmp_path), bootstrap=0)(run)
    assert result["words_with_side"] == 2
    assert result["side"] == 0.5


def test_chance_is_the_box_area_in_the_cropped_image(tmp_path: Path) -> None:
    """The model sees the middle 32 of 40 rows, so a box on the lower half covers 16 of them."""
    run = looking(gloria_evaluation(tmp_path), {0: (0, 0), 2: (0, 0), 4: (0, 0)})
    result = PointingGame(root=str(tmp_path), bootstrap=0)(run)
    assert result["box_chance"] == pytest.approx((0.25 + 0.125 + 0.25) / 3)


def test_words_for_a_finding_can_be_given(tmp_path: Path) -> None:
    run = looking(gloria_evaluation(tmp_path), {0: (3, RIGHT), 2: (3, LEFT), 4: (0, LEFT)})
    words = {"Pleural Effusion": ["pleural", "left"]}
    result = PointingGame(root=str(tmp_path), words=words, bootstrap=0)(run)
    assert result["words"] == 4  # two in line 1, none in line 3, two in line 5


def test_null_without_words_and_regions(tmp_path: Path) -> None:
    run = gloria_evaluation(tmp_path)
    run.networks.local = SimpleNamespace(attention=lambda *_: None)  # type: ignore[assignment]
    result = PointingGame(root=str(tmp_path))(run)
    assert (result["words"], result["side"], result["box"], result["box_chance"]) == (0,) + (
        None,
    ) * 3
    assert result["side_interval"] is None


def test_an_untrained_model_gives_numbers(tmp_path: Path) -> None:
    run = gloria_evaluation(tmp_path)
    metric = PointingGame(root=str(tmp_path), bootstrap=20)
    metric.check(run)
    result = metric(run)
    assert result["words"] == 3
    assert 0 <= result["side"] <= 1
    json.dumps(result)


def test_mismatched_files_and_models_without_regions_are_refused(tmp_path: Path) -> None:
    run = gloria_evaluation(tmp_path)
    write_pairs(tmp_path, findings=FINDINGS[:3])
    with pytest.raises(DataError, match=r"test\.finding\.jsonl has 3 lines.*line 5"):
        PointingGame(root=str(tmp_path)).check(run)
    plain = evaluation(split_features({"visual": random(2, 3)}))
    plain.networks.members = [lambda: torch.nn.Linear(1, 1)]
    with pytest.raises(ConfigError, match=r"^Linear compares no words"):
        PointingGame(root=str(tmp_path)).check(plain)


def write(root: Path, *lines: str) -> str:
    (root / "test.finding.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(root)


def test_reads_names_sides_and_boxes(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        '{"Mass": {"side": "left", "parts": [{"box": [0, 0.5, 1, 1], "centre": [0.5, 0.7]}]}}',
        "{}",
        '{"A": {"side": "bilateral"}, "B": {"side": null, "severity": "mild", "parts": []}}',
    )
    assert read_findings(root, "test", "finding.jsonl") == [
        [Finding("Mass", "left", ((0.0, 0.5, 1.0, 1.0),))],
        [],
        [Finding("A", None, ()), Finding("B", None, ())],
    ]


def test_patient_left_is_image_right() -> None:
    halves = [Finding("Mass", side, ()).image_half for side in ("left", "right", None)]
    assert halves == ["right", "left", None]


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[1]",
        '{"Mass": 3}',
        '{"Mass": {"parts": [{"centre": [0, 0]}]}}',
        '{"Mass": {"parts": [{"box": [0, 0, 1]}]}}',
        '{"Mass": {"parts": [{"box": [0, 0, 1, "x"]}]}}',
    ],
)
def test_a_bad_line_is_an_error(tmp_path: Path, line: str) -> None:
    root = write(tmp_path, "{}", line)
    with pytest.raises(DataError, match=r"test\.finding\.jsonl:2: not a record of findings.*box"):
        read_findings(root, "test", "finding.jsonl")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.finding\.jsonl"):
        read_findings(str(tmp_path), "test", "finding.jsonl")
