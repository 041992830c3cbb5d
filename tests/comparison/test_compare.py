"""The compare command: rows, refused inputs and output formats."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.comparison.runs import write_run
from vilmedic import cli
from vilmedic.comparison.runs import read_runs
from vilmedic.comparison.table import Comparison, compare, footnotes, text_of
from vilmedic.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def grid(tmp_path: Path) -> list[Path]:
    """Two learning rates with three seeds each; the second is much better."""
    return [
        write_run(
            tmp_path / f"lr{lr}-seed{seed}",
            seed=seed,
            skill=skill,
            draw=seed + 10 * place,
            trainor__optim_params={"lr": lr},
        )
        for place, (lr, skill) in enumerate([(0.001, 0.5), (0.01, 2.0)])
        for seed in (0, 1, 2)
    ]


def column(found: Comparison, name: str) -> Any:
    return next(one for one in found.columns if one.name == name)


def test_runs_that_differ_only_in_name_and_seed_are_one_row(grid: list[Path]) -> None:
    found = compare(grid, number=200)
    assert list(found.settings) == ["lr=0.001", "lr=0.01"]
    assert [len(runs) for runs in found.settings.values()] == [3, 3]
    area = column(found, "zero_shot auroc")
    values = [run.numbers["zero_shot auroc"] for run in found.settings["lr=0.01"]]
    best = area.cells[1]
    assert best.estimate.value == pytest.approx(np.mean(values))
    assert best.estimate.spread == pytest.approx(np.std(values, ddof=1))
    assert best.estimate.over == "samples and seeds"
    assert (area.best, best.bold, best.difference) == (1, True, None)
    assert area.cells[0].difference.value < -0.2
    assert area.cells[0].difference.significant
    assert not area.cells[0].bold


def test_differences_only_between_seeds_are_noted(grid: list[Path]) -> None:
    def told(found: Comparison) -> str:
        return next(line for line in footnotes(found) if line.startswith("differences: "))

    assert told(compare(grid, number=0)).startswith("differences: between seeds alone; ")
    assert told(compare(grid, number=20)).startswith(
        "differences: paired on the same samples, between seeds alone for loss; "
    )
    ours = compare([*grid[:1], *grid[3:4]], number=20)
    assert told(ours).startswith("differences: paired on the same samples; ")


def test_one_resample_is_refused(grid: list[Path]) -> None:
    with pytest.raises(ConfigError, match="--bootstrap: given 1, which has no spread; allowed: 0"):
        compare(grid, number=1)


def test_a_lower_loss_is_better(grid: list[Path]) -> None:
    found = compare([grid[2], grid[3]], number=0)
    assert column(found, "loss").best == 1
    assert column(found, "zero_shot auroc").best == 1


def test_insignificant_differences_are_not_bold(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, draw=draw, trainor__epochs=draw)
        for name, draw in (("a", 1), ("b", 2))
    ]
    found = compare(runs, number=300)
    area = column(found, "zero_shot auroc")
    (gap,) = [cell.difference for cell in area.cells if cell.difference]
    assert gap.interval[0] < 0 < gap.interval[1]
    assert not any(cell.bold for one in found.columns for cell in one.cells)
    assert "not significant" in text_of(found, "table")


def test_a_table_is_as_wide_as_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        write_run(tmp_path / name, draw=draw, trainor__epochs=draw)
        for name, draw in (("a", 1), ("b", 2))
    ]
    found = compare(runs, number=20)
    whole = text_of(found, "table").splitlines()
    monkeypatch.setenv("COLUMNS", "80")
    narrow = text_of(found, "table").splitlines()
    assert max(map(len, whole)) > 80 >= max(map(len, narrow))
    names = [one.name for one in found.columns]
    headings = [line for line in narrow if line.startswith("setting ")]
    assert len(headings) > 1
    assert [name for line in headings for name in names if f"{name} " in f"{line} "] == names
    gaps = narrow[narrow.index("Differences to the best") :]
    place = next(n for n, line in enumerate(gaps) if line.startswith("zero_shot auroc, to "))
    assert gaps[place + 1].split()[-2:] == ["not", "significant"]


def test_one_run_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    assert cli.compare([str(run)]) == 0
    out = capsys.readouterr().out
    assert "split test: 200 samples, 1 run, 1 setting" in out
    assert re.search(r"^a +1 +1\.000 +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", out, re.MULTILINE)
    assert "Differences" not in out


def test_many_runs_are_listed_without_resampling(
    grid: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilmedic.comparison.table.MOST_RESAMPLED", 5)
    found = compare(grid)
    assert column(found, "zero_shot auroc").cells[0].estimate.over == "seeds"
    assert "more than 5 runs: no samples are drawn" in text_of(found, "table")
    assert column(compare(grid[:5]), "zero_shot auroc").cells[0].estimate.draws.size == 1000


def test_without_predictions_the_intervals_of_the_evaluation_are_shown(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, draw=k, trainor__epochs=k, predictions=False)
        for k, name in enumerate("ab")
    ]
    found = compare(runs)
    area = column(found, "zero_shot auroc")
    value = area.cells[0].estimate.value
    assert area.cells[0].estimate.interval == pytest.approx((value - 0.1, value + 0.1))
    assert [cell.difference for cell in area.cells] == [None, None]
    assert "not tested, for lack of values of single samples" in text_of(found, "table")


def test_predictions_of_another_evaluation_are_not_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", skill=2.0)
    other = write_run(tmp_path / "b", skill=0.1)
    (stale,) = other.glob("evaluations/*/predictions_test.npz")
    (own,) = run.glob("evaluations/*/predictions_test.npz")
    stale.replace(own)
    found = compare([run], number=50)
    assert column(found, "zero_shot auroc").cells[0].estimate.draws is None


def test_a_row_for_each_value_of_a_key(grid: list[Path]) -> None:
    more = write_run(grid[0].parent / "x", seed=0, model__proto="GLoRIA")
    found = compare([*grid, more], by=["model.proto"], number=0)
    assert {name: len(runs) for name, runs in found.settings.items()} == {
        "proto=ConVIRT": 6,
        "proto=GLoRIA": 1,
    }
    assert "proto=ConVIRT: 6 runs, which also differ in trainor.optim_params.lr" in text_of(
        found, "md"
    )
    with pytest.raises(ConfigError, match=r"no run has the key 'model\.prot'.*model\.proto"):
        compare(grid, by=["model.prot"])


def test_several_seeds_of_one_directory_are_several_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", seed=0)
    other = write_run(tmp_path / "b", seed=1)
    (other / "config_1.yml").replace(run / "config_1.yml")
    (folder,) = (other / "evaluations").iterdir()
    folder.replace(run / "evaluations" / folder.name)
    _, runs = read_runs([run], None)
    assert [one.seeds for one in runs] == [(0,), (1,)]
    assert list(compare([run], number=0).settings.values()) == [runs]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"samples": 150}, "the sample lists differ: 150 and 200 samples"),
        (
            {"names": [f"x/{i + 5}.png" for i in range(200)]},
            "first in 'line 1: 5.png' and 'line 1: 0.png'",
        ),
        ({"classes": ["Effusion", "Edema"]}, "the labels of zero_shot differ, in Edema, Mass"),
        ({"classes": ["Mass", "Effusion"]}, "the labels of zero_shot differ, in their order"),
        (
            {"protocol": {"similarity": "local"}},
            "protocols.zero_shot.similarity differs: local and None",
        ),
    ],
)
def test_incomparable_runs_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", trainor__epochs=9, **changes)]
    words = [str(run) for run in runs]
    assert cli.compare(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{runs[1]} and {runs[0]}: " in err
    assert expected in err
    assert cli.compare([*words, "--anyway", "--bootstrap", "20"]) == 0
    assert f"not comparable: {runs[1]} and {runs[0]}: " in capsys.readouterr().out


def test_a_moved_prompt_file_is_the_same_protocol(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", seed=1, protocol={"prompts": "elsewhere/p.yml"}),
    ]
    assert len(compare(runs, number=0).settings) == 1


def test_all_directories_without_an_evaluated_run_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / name) for name in ("empty", "none")]
    assert cli.compare(words) == 2
    err = capsys.readouterr().err
    assert "2 problems" in err
    assert "empty: not the directory of a run" in err
    assert "none: there is no such run directory" in err
    run = write_run(tmp_path / "a", split="validate")
    assert cli.compare([str(run), "--split", "test"]) == 2
    err = capsys.readouterr().err
    assert "there are results only of validate, not of test. Evaluate it first" in err
    assert cli.compare([str(run)]) == 0


def test_a_run_without_an_evaluation_is_skipped_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    (other / "results_test.json").unlink()
    shutil.rmtree(other / "evaluations")
    assert cli.compare([str(run), str(other)]) == 2
    assert f"{other}: there are results of no split" in capsys.readouterr().err
    assert cli.compare([str(run), str(other), "--anyway", "--bootstrap", "0"]) == 0
    out = capsys.readouterr().out
    assert "1 run, 1 setting" in out
    assert f"left out: {other}: there are results of no split, not of test." in out
    assert cli.compare([str(other), "--anyway"]) == 2


def test_a_run_given_by_two_paths_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    paths = [run, Path("a"), tmp_path / "link", Path("a/../a")]
    assert [len(runs) for runs in compare(paths, number=0).settings.values()] == [1]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert cli.compare([str(tmp_path / "loop")]) == 2
    assert "loop: there is no such run directory" in capsys.readouterr().err


def test_the_same_seed_twice_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"copy and .*a: the same setting with the same seed"):
        compare([run, tmp_path / "copy"], number=0)
    found = compare([run, tmp_path / "copy"], number=0, anyway=True)
    assert any("not comparable: " in note for note in found.notes)
    other_part = write_run(tmp_path / "b", dataset__fraction_seed=1)
    assert [len(runs) for runs in compare([run, other_part], number=0).settings.values()] == [2]


def test_a_number_missing_in_some_runs_is_reported(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, seed=k) for k, name in enumerate("ab")]
    for path in runs[1].rglob("results_test.json"):
        results = json.loads(path.read_text())
        results["metrics"]["zero_shot"]["auroc"] = float("nan")
        path.write_text(json.dumps(results))
    notes = compare(runs, number=0).notes
    assert (
        "a and 1 more: zero_shot auroc is that of 1 of 2 runs; the others have no such number"
        in (notes)
    )


def test_a_setting_has_one_line(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / x, trainor__x=x * 300 + "\n\u202e") for x in "ab"]
    found = compare(runs, number=0)
    assert [label[:4] for label in found.settings] == ["x=aa", "x=bb"]
    assert all("\n" not in label and len(label) < 250 for label in found.settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoints": []},
        {"checkpoints": [5]},
        {"checkpoints": [{"seed": [1]}]},
        {"models_used": 0},
        {"samples": 0},
        {"split": "../test"},
        {"evaluation": "../../elsewhere"},
    ],
)
def test_malformed_results_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = write_run(tmp_path / "a")
    path = run / "results_test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match="a: its results of test cannot be read"):
        compare([run], number=0)


@pytest.mark.parametrize("value", [10**400, 1e200, float("inf"), True, "0.5", None])
def test_non_numbers_are_skipped(tmp_path: Path, value: Any) -> None:
    run = write_run(tmp_path / "a")
    for path in run.rglob("results_test.json"):
        results = json.loads(path.read_text())
        results["metrics"]["zero_shot"]["auroc"] = value
        path.write_text(json.dumps(results))
    names = [one.name for one in compare([run], number=10).columns]
    assert "zero_shot average_precision" in names
    assert "zero_shot auroc" not in names


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("lines", None, "lacks the array lines"),
        ("label_names", None, "lacks the array label_names"),
        ("lines", lambda one: one[0], "lines is a single value, not 200"),
        ("images", lambda one: one[:9], "images is 9, not 200"),
        ("labels", lambda one: one[:, 0], "labels is 200, not 200 x 2"),
        ("zero_shot/scores", lambda one: one[:, :1], "zero_shot/scores is 200 x 1, not 200 x 2"),
        ("zero_shot/scores", lambda one: one.astype(str), "zero_shot/scores holds no numbers"),
        ("retrieval/image_to_text_above", lambda one: one[:, None], "is 200 x 1, not 200"),
    ],
)
def test_predictions_of_another_shape_are_refused(
    tmp_path: Path, name: str, change: Any, expected: str
) -> None:
    runs = [write_run(tmp_path / x, seed=k) for k, x in enumerate("ab")]
    (path,) = runs[0].glob("evaluations/*/predictions_test.npz")
    arrays = dict(np.load(path))
    if change is None:
        del arrays[name]
    else:
        arrays[name] = np.asarray(change(arrays[name]))
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=re.escape(expected)):
        compare(runs, number=10)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "[" * 100_000, '{"metrics": {"knn": 3}, "samples": true}']
)
def test_damaged_results_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    run = write_run(tmp_path / "a")
    (run / "results_test.json").write_text(text)
    assert cli.compare([str(run)]) == 2
    assert "a: its results of test cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["predictions_test.npz", "evaluation.json"])
def test_damaged_evaluation_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)]
    (damaged,) = runs[1].glob(f"evaluations/*/{name}")
    damaged.write_text("x")
    assert cli.compare([str(run) for run in runs]) == 2
    assert re.search(rf"{name}: (cannot be|holds no)", capsys.readouterr().err)


def test_the_csv_has_every_number(grid: list[Path]) -> None:
    found = compare(grid, number=100)
    lines = list(csv.DictReader(io.StringIO(text_of(found, "csv"))))
    area = column(found, "zero_shot auroc")
    for line, cell in zip(lines, area.cells, strict=True):
        assert float(line["zero_shot auroc"]) == cell.estimate.value
        assert float(line["zero_shot auroc low"]) == cell.estimate.interval[0]
    assert float(lines[0]["zero_shot auroc p holm"]) == area.cells[0].difference.corrected
    assert [line["zero_shot auroc best"] for line in lines] == ["0", "1"]


def test_names_are_escaped(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, trainor__x=x) for name, x in (("a", "50%"), ("b", "<|_"))]
    found = compare(runs, number=0)
    assert "x=&lt;|_" in text_of(found, "html")
    assert "x=<\\|_" in text_of(found, "md")
    assert r"x=$<$|\_" in text_of(found, "latex")
    assert r"x=50\%" in text_of(found, "latex")


def test_the_best_is_bold_in_every_format(grid: list[Path]) -> None:
    found = compare(grid, number=100)
    value = f"{column(found, 'zero_shot auroc').cells[1].estimate.value:.3f}"
    marks = {"table": f"*{value}", "md": f"**{value}**", "html": f"<b>{value}</b>"}
    for form, text in {**marks, "latex": f"\\textbf{{{value}}}"}.items():
        assert text in text_of(found, form)


def test_comparing_needs_neither_torch_nor_a_checkpoint(grid: list[Path]) -> None:
    script = (
        "import sys; from vilmedic import cli; status = cli.compare(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules); "
        "sys.exit(status or ','.join(heavy) or 0)"
    )
    words = [sys.executable, "-c", script, *map(str, grid)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Differences to the best" in done.stdout
