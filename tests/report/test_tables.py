from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.report.runs import results
from vilmedic.evaluation.evaluations import EvaluationFolder
from vilmedic.evaluation.predictions import pack_predictions
from vilmedic.report.tables import Cell, Table, read_evaluations, read_results, shown


def texts(table: Table) -> list[tuple[str, list[tuple[str, str]]]]:
    """The displayed rows."""
    return [(name, [(cell.text, cell.interval) for cell in cells]) for name, cells in table.rows]


def test_model_and_baselines_are_side_by_side_with_intervals(tmp_path: Path) -> None:
    (tmp_path / "results_test.json").write_text(json.dumps(results()))
    (tmp_path / "results_validate.json").write_text(json.dumps(results() | {"split": "validate"}))

    first, second = read_results(tmp_path)

    assert (first.split, second.split) == ("test", "validate")
    assert first.samples == 1234
    assert first.source == "ConVIRT, epoch 3, seed 1"
    loss, probe, classes, fit = first.tables
    assert texts(loss) == [("loss", [("1.500", ""), ("-", "")])]
    assert probe.columns == ["ConVIRT", "raw pixels"]
    assert texts(probe) == [("AUROC", [("0.912", "0.900 to 0.950"), ("0.600", "")])]
    assert classes.title == "linear probe: by class"
    assert texts(classes)[0] == ("Effusion", [("0.800", "0.700 to 0.900")])
    assert classes.details
    assert texts(fit) == [("l2", [("0.500", "")]), ("iterations", [("12", "")])]


def test_the_headline_has_the_first_number_of_each_protocol(tmp_path: Path) -> None:
    content = results()
    content["metrics"]["retrieval"] = {"image_to_text_r1": 0.1, "image_to_text_r5": 0.4}
    content["metrics"]["zero_shot_2"] = {"auroc": None}
    content["protocols"] = {"retrieval": {"similarity": "both"}}
    (tmp_path / "results_test.json").write_text(json.dumps(content))
    [read] = read_results(tmp_path)
    assert texts(read.headline) == [
        ("linear probe: AUROC", [("0.912", "0.900 to 0.950"), ("0.600", "")]),
        ("retrieval, both similarities: image to text, recall at 5", [("0.400", ""), ("-", "")]),
    ]


def test_the_retrieval_interval_comes_from_all_ranks(tmp_path: Path) -> None:
    above = np.arange(40) % 10
    content = results() | {"samples": 40}
    content["metrics"]["retrieval"] = {"image_to_text_r5": 0.5, "image_to_text_r1": 0.9}
    (tmp_path / "results_test.json").write_text(json.dumps(content))
    ranks = {"image_to_text_above": above, "image_to_text_beside": np.zeros(40, int)}
    packed = pack_predictions({"lines": np.arange(1, 41)}, {"retrieval": ranks})
    (tmp_path / "predictions_test.npz").write_bytes(packed)
    [read] = read_results(tmp_path)
    [table] = [table for table in read.tables if table.title == "retrieval"]
    five, one = (cells[0] for _, cells in table.rows)
    assert five.bounds is not None
    assert 0.3 < five.bounds[0] < 0.45 < 0.55 < five.bounds[1] < 0.7
    assert one.bounds is None  # predictions of another evaluation are not used


def test_the_csv_file_has_all_digits(tmp_path: Path) -> None:
    (tmp_path / "results_test.json").write_text(json.dumps(results()))
    [read] = read_results(tmp_path)
    probe = next(table for table in read.tables if table.title == "linear probe")
    head, _, packed = probe.csv.partition(",")
    assert head == "data:text/csv;base64"
    rows = list(csv.reader(base64.b64decode(packed).decode().splitlines()))
    assert rows[0] == ["", "ConVIRT", "ConVIRT, lower", "ConVIRT, upper", "raw pixels"]
    assert rows[1] == ["AUROC", "0.91234", "0.9", "0.95", "0.6"]
    assert probe.file.endswith("test-linear-probe")
    evil = Table("t", ["=1+1"], [("@SUM(A1)", [Cell("-")])])
    text = base64.b64decode(evil.csv.partition(",")[2]).decode()
    assert text == ",'=1+1\n'@SUM(A1),\n"


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
    assert rows["evaluated"][first] == Cell("ConVIRT, epoch 3, seed 1")
    assert rows["evaluated"][second] == Cell("ConVIRT, epoch 3, seed 1, averaged weights")
    assert {name: cell.text for name, cell in rows["test: loss"].items()} == {
        first: "1.500",
        second: "2.500",
    }
    assert rows["test: linear probe auroc"][first].text == "0.912"
    assert rows["differs"] == {first: Cell("k 20"), second: Cell("k 5")}


@pytest.mark.parametrize("text", ["{", "[]", '{"split": "test"}'])
def test_a_damaged_file_is_skipped_with_a_warning(
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
def test_number_format_of_the_page(value: object, text: str) -> None:
    assert shown(value) == text
