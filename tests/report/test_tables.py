from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.runs import results
from vilmedic.report.tables import read_results, shown


def test_model_and_baselines_stand_side_by_side_with_intervals(tmp_path: Path) -> None:
    (tmp_path / "results_test.json").write_text(json.dumps(results()))
    (tmp_path / "results_validate.json").write_text(json.dumps(results() | {"split": "validate"}))

    first, second = read_results(tmp_path)

    assert (first.split, second.split) == ("validate", "test")
    assert second.samples == 1234
    assert second.source.endswith("(epoch 2, seed 1)")
    loss, probe, classes, fit = second.tables
    assert loss.rows == [("loss", [("1.500", ""), ("-", "")])]
    assert probe.columns == ["model", "raw pixels"]
    assert probe.rows == [("auroc", [("0.912", "0.900 to 0.950"), ("0.600", "")])]
    assert classes.rows[0] == ("Effusion", [("0.800", "0.700 to 0.900")])
    assert classes.details
    assert fit.rows == [("l2", [("0.500", "")]), ("iterations", [("12", "")])]


@pytest.mark.parametrize("text", ["{", "[]", '{"split": "test"}'])
def test_a_damaged_file_is_left_out_with_a_warning(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "results_test.json").write_text(text)
    assert read_results(tmp_path) == []
    assert "results_test.json is left out" in caplog.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (True, "-"),
        ("x", "-"),
        (1234, "1,234"),
        (0.12345, "0.123"),
        (90.0, "90.0"),
        (0.00012, "1.20e-04"),
        (0.0, "0.000"),
    ],
)
def test_numbers_as_the_page_writes_them(value: object, text: str) -> None:
    assert shown(value) == text
