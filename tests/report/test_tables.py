from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.runs import results
from vilmedic.evaluation.evaluations import EvaluationFolder
from vilmedic.report.tables import read_evaluations, read_results, shown


def test_model_and_baselines_stand_side_by_side_with_intervals(tmp_path: Path) -> None:
    (tmp_path / "results_test.json").write_text(json.dumps(results()))
    (tmp_path / "results_validate.json").write_text(json.dumps(results() | {"split": "validate"}))

    first, second = read_results(tmp_path)

    assert (first.split, second.split) == ("validate", "test")
    assert second.samples == 1234
    assert second.source == "ConVIRT, epoch 3, seed 1"
    loss, probe, classes, fit = second.tables
    assert loss.rows == [("loss", [("1.500", ""), ("-", "")])]
    assert probe.columns == ["ConVIRT", "raw pixels"]
    assert probe.rows == [("auroc", [("0.912", "0.900 to 0.950"), ("0.600", "")])]
    assert classes.rows[0] == ("Effusion", [("0.800", "0.700 to 0.900")])
    assert classes.details
    assert fit.rows == [("l2", [("0.500", "")]), ("iterations", [("12", "")])]


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    older = {key: value for key, value in results().items() if key not in ("system", "ema")}
    (tmp_path / "results_test.json").write_text(json.dumps(older))
    [read] = read_results(tmp_path)
    assert read.source == "model, epoch 3, seed 1"
    assert read.tables[0].columns[0] == "model"


def test_every_evaluation_has_a_column(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) is None
    about = {"system": "ConVIRT", "checkpoints": results()["checkpoints"], "generated": False}
    names = []
    for k, loss in ((20, 1.5), (5, 2.5)):
        one = EvaluationFolder(tmp_path, "best-1", ema=k == 5, settings={"k": k}, about=about)
        one.write(results() | {"loss": loss})
        names.append(one.name)
    table = read_evaluations(tmp_path)
    assert table is not None
    assert sorted(table.columns) == sorted(names)
    rows = {name: dict(zip(table.columns, cells, strict=True)) for name, cells in table.rows}
    first, second = names
    assert next(iter(rows)) == "evaluated"
    assert list(rows)[-1] == "differs"
    assert rows["evaluated"][first] == ("ConVIRT, epoch 3, seed 1", "")
    assert rows["evaluated"][second] == ("ConVIRT, epoch 3, seed 1, averaged weights", "")
    assert rows["test: loss"] == {first: ("1.500", ""), second: ("2.500", "")}
    assert rows["test: linear probe auroc"][first] == ("0.912", "")
    assert rows["differs"] == {first: ("k 20", ""), second: ("k 5", "")}


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
