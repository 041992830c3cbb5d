from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import pytest

from tests.comparison import runs as evaluated
from tests.report.runs import write_curves, write_run
from vilmedic import cli
from vilmedic.comparison.table import compare, text_of
from vilmedic.report.curves import Line
from vilmedic.report.side_by_side import overlaid, write_comparison


def test_each_metric_has_a_line_per_run() -> None:
    curves = {
        "a": [Line("loss", 0, [1, 2], [3.0, 2.0]), Line("lr", 0, [1], [0.1])],
        "b": [Line("loss", 0, [1], [4.0]), Line("loss", 1, [1], [5.0])],
    }
    panels = {panel.title: panel.lines for panel in overlaid(curves)}
    assert panels["Loss"] == [
        Line("a", 0, [1, 2], [3.0, 2.0]),
        Line("b", 0, [1], [4.0]),
        Line("b", 1, [1], [5.0]),
    ]
    assert panels["Learning rate"] == [Line("a", 0, [1], [0.1])]


def test_the_curves_that_matter_come_first_with_plain_titles() -> None:
    names = ["lr", "data_wait", "validation_zero_shot_auroc", "temperature", "loss", "train_loss"]
    names += ["validation_loss", "grad_norm", "image_to_text"]
    panels = overlaid({"a": [Line(name, 0, [1], [0.1]) for name in names]})
    assert [panel.title for panel in panels if not panel.folded] == [
        "Loss: loss of single steps",
        "Loss: train_loss, mean of the epoch",
        "Loss: validation_loss",
        "Zero shot, validate split",
        "Learning rate",
        "Gradient norm",
    ]
    assert len(panels) == len(names)


def test_one_page_has_the_curves_and_the_table(tmp_path: Path) -> None:
    both = [
        evaluated.write_run(tmp_path / name, draw=k, trainor__epochs=k)
        for k, name in enumerate("ab")
    ]
    for run in both:
        write_curves(run, seed=0)
    path = write_comparison(both)
    assert path == tmp_path / "comparison.html"
    page = path.read_text()
    assert text_of(compare(both), "html") in page
    [packed] = re.findall(r'id="data-curves">([^<]*)<', page)
    panels = json.loads(gzip.decompress(base64.b64decode(packed)))
    loss = next(panel for panel in panels if panel["title"].startswith("Loss: loss"))
    assert [line["name"] for line in loss["lines"]] == ["a", "b"]


def test_incomparable_runs_are_marked(tmp_path: Path) -> None:
    both = [
        evaluated.write_run(tmp_path / "a"),
        evaluated.write_run(tmp_path / "b", samples=100, trainor__epochs=5),
    ]
    page = write_comparison(both).read_text()
    assert 0 < page.index("<li>not comparable: ") < page.index("<table>"), "before the numbers"


def test_without_results_the_page_explains_the_missing_table(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_curves(tmp_path / name, seed=0)
    page = write_comparison([tmp_path / "a", tmp_path / "b"]).read_text()
    assert "No table: " in page
    assert "there are results of no split" in page


def test_the_command_writes_the_page_of_several_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(write_run(tmp_path / name)) for name in ("a", "<b>")]
    assert cli.report(words) == 0
    assert f"Written: {tmp_path}/comparison.html" in capsys.readouterr().out
    page = (tmp_path / "comparison.html").read_text()
    assert "<code>&lt;b&gt;</code>" in page
    assert cli.report([words[0], words[0]]) == 0
    assert "comparison" not in capsys.readouterr().out
