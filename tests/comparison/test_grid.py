from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from vilmedic.comparison.grid import plan, read_axes, run_names
from vilmedic.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "config/phantom/convirt.yml")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1,2", ["0", "1", "2"]),
        ("0.01, 0.1", ["0.01", "0.1"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ("\"a,b\",'c,d'", ['"a,b"', "'c,d'"]),
        ('["a,]",x],y', ['["a,]",x]', "y"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("it's,its", ["it's", "its"]),
        ("f(1,2),g", ["f(1,2)", "g"]),
        ("log(1e-5,1e-3,3)", ["1e-05", "0.0001", "0.001"]),
        ("lin(0,1,3)", ["0", "0.5", "1"]),
    ],
)
def test_values_of_a_key(text: str, values: list[str]) -> None:
    assert read_axes([f"a.b={text}"]) == ([], {"a.b": values})


@pytest.mark.parametrize("word", ["a=1", "a=[1,2]", 'a="x,y"', "~a.b", "a=", "a={b: 1, c: 2}"])
def test_one_value_is_not_varied(word: str) -> None:
    assert read_axes([word]) == ([word], {})


def test_log_has_equal_ratios() -> None:
    _, axes = read_axes(["lr=log(1e-5,1e-3,5)"])
    logs = [math.log10(float(value)) for value in axes["lr"]]
    assert logs == pytest.approx([-5, -4.5, -4, -3.5, -3], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a=1,,2"], "a: given 1,,2; a value between two commas is empty"),
        (["a=[1,2"], "a: given [1,2; a ] is missing"),
        (["a='x,y"], "a: given 'x,y; a ' is missing"),
        (["a=1,1"], "a: the value 1 is given twice"),
        (["a=1,2", "a=3"], "a: is given twice"),
        (["a=3", "a=1,2"], "a: is given twice"),
        (["name=x,y"], "name: given 2 values"),
        (["a=log(0,1,3)"], "allowed: two different ends above 0"),
        (["a=log(1,2)"], "a: a range without a number of values is for --search"),
        (["a=int(1,2)"], "a: a range without a number of values is for --search"),
        (["a=int(1,8,3)"], "with --search also log(from,to), lin(from,to) and int(from,to)"),
        (["a=int(1,8.5)"], "which are no whole numbers"),
        (["a=log(1)"], "allowed: log(from,to,how many)"),
        (["a=lin(0,inf)"], "allowed: finite ends"),
        (["name=lin(0,1)"], "name: given a range"),
        (["a=log(x,1,3)"], "are no numbers"),
        (["a=lin(1,2,1)"], "allowed: 2 to 10,000 values"),
        (["a"], "'a' (command line): has no '='"),
    ],
)
def test_invalid_grids_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_axes(words)
    assert expected in str(caught.value)


def test_run_names_are_the_shortest_unambiguous_keys() -> None:
    axes = {"dataset.fraction": ["0.1", "1"], "trainor.seed": ["0"]}
    assert run_names(axes) == ["fraction=0.1-seed=0", "fraction=1-seed=0"]
    axes = {"dataset.seed": ["0"], "trainor.seed": ["1"]}
    assert run_names(axes) == ["dataset.seed=0-trainor.seed=1"]


def test_run_names_are_unique_folder_names() -> None:
    names = run_names({"a": ["x/y", "x:y", "z" * 300]})
    assert len(set(names)) == 3
    assert all("/" not in name and len(name) < 120 for name in names)


def test_each_run_is_a_separate_checked_command(tmp_path: Path) -> None:
    words = ["trainor.seed=0,1", "trainor.epochs=1,2", f"ckpt_dir={tmp_path}", "~trainor.lr_decay"]
    runs = plan(CONFIG, words)
    assert [run.name for run in runs] == [
        f"phantom-convirt/seed={seed}-epochs={epochs}" for seed in (0, 1) for epochs in (1, 2)
    ]
    last = runs[-1]
    assert (last.config.trainor.seed, last.config.trainor.epochs) == (1, 2)
    assert last.config.ckpt == "auto"
    assert last.run_dir == tmp_path / last.name
    assert last.words[-2:] == (f"name={last.name}", "ckpt=auto")
    assert "~trainor.lr_decay" in last.words
    named = plan(CONFIG, ["trainor.seed=0,1", "name=mine"])
    assert [run.name for run in named] == ["mine/seed=0", "mine/seed=1"]


def test_errors_of_all_runs_are_reported_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(CONFIG, ["trainor.batch_size=8,-1", "trainor.seed=0,x"])
    text = str(caught.value)
    assert "trainor.batch_size" in text
    assert "trainor.seed" in text
    assert "given -1" in text


def test_one_value_in_two_notations_is_refused(tmp_path: Path) -> None:
    words = ["trainor.optim_params.lr=1e-3,0.001", "trainor.seed=0,1", f"ckpt_dir={tmp_path}"]
    with pytest.raises(ConfigError) as caught:
        plan(CONFIG, [*words, "name=mine"])
    assert caught.value.problems == [
        f"mine/lr=0.001-seed={seed}: is the same run as mine/lr=1e-3-seed={seed}, "
        "with a value written in another way."
        for seed in (0, 1)
    ]


def test_checking_needs_no_torch() -> None:
    script = (
        "import sys; from vilmedic.comparison import sweep; from vilmedic.comparison.grid import "
        "plan; plan(sys.argv[1], ['trainor.seed=0,1']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, CONFIG], cwd=ROOT).returncode == 0
