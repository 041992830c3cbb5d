"""Searches with a stub training command, whose loss is a function of the given values."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock

from vilmedic import cli
from vilmedic.comparison.grid import Planned, plan_search
from vilmedic.comparison.search import METRICS, STUDY, opened
from vilmedic.comparison.sweep import RECORD, Sweep
from vilmedic.errors import ConfigError, VilmedicError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "config/phantom/convirt.yml")
TRAINING = """\
import json, math, os, sys, time
from pathlib import Path
step, config, *words = sys.argv[1:]
values = dict(word.split("=", 1) for word in words)
folder = Path(values["ckpt_dir"]) / values["name"]
rate = float(values.get("trainor.optim_params.lr", 1e-3))
time.sleep(float(os.environ.get("PAUSE", 0)))
if step == "train" and rate > float(os.environ.get("DIVERGES_ABOVE", 1)):
    sys.exit("error: the loss is not finite")
if step == "train":
    loss = (math.log10(rate) + 3) ** 2 + float(values.get("model.loss.tau", 0))
    losses = [None, loss + 1, math.nan, loss, loss + 2]
    given = [{"validation_loss": one} for one in losses]
    lines = [{"seed": 0, "step": n, "loss": 9.0} | one for n, one in enumerate(given)]
    if os.environ.get("SCORELESS") == "1":
        lines = lines[:1]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\\n" for one in lines))
"""
DRIVER = """\
import sys
from pathlib import Path
from tests.comparison.test_search import search
from vilmedic.errors import Interrupted
try:
    search(Path(sys.argv[1]), trials=8)
except Interrupted as stop:
    sys.exit(stop.status)
"""
WORDS = ["trainor.optim_params.lr=log(1e-5,1e-1)", "model.loss.tau=0.1,0.5", "trainor.seed=0"]


def search(
    folder: Path,
    words: list[str] = WORDS,
    *,
    trials: int,
    report: Any = print,
    evaluate: bool = False,
    jobs: int = 1,
) -> Sweep:
    """Run a search with the command and return the sweep, even if it failed."""
    script = folder / "training.py"
    script.write_text(TRAINING)
    space = plan_search(CONFIG, [*words, f"ckpt_dir={folder / 'ckpt'}", "name=s"])
    with opened(space, trials=trials, metric="validation_loss") as one:
        run = Sweep("c.yml", one.begun(), jobs, evaluate, report)
        run.another, run.ended = one.another, one.ended
        run.command = lambda step: [sys.executable, "-I", "-S", str(script), step]
        try:
            run.start()
        finally:
            report(one.best())
    return run


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials as optuna reads them."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "ckpt/s" / STUDY))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=None, storage=storage).get_trials()


def rates(folder: Path) -> list[float]:
    return [one.params["trainor.optim_params.lr"] for one in trials_of(folder)]


def test_each_trial_is_a_run(tmp_path: Path) -> None:
    told: list[str] = []
    search(tmp_path, trials=4, report=told.append, evaluate=True)
    trials = trials_of(tmp_path)
    assert [one.state.name for one in trials] == ["COMPLETE"] * 4
    folders = sorted(path.name for path in (tmp_path / "ckpt/s").glob("trial=*"))
    assert [one.user_attrs["run"].removeprefix("s/") for one in trials] == folders
    for trial, name in zip(trials, folders, strict=True):
        rate, tau = trial.params["trainor.optim_params.lr"], trial.params["model.loss.tau"]
        assert 1e-5 <= rate <= 1e-1
        assert name == f"trial={trial.number:03d}-lr={rate}-tau={tau}"
        record = json.loads((tmp_path / "ckpt/s" / name / RECORD).read_text())
        given = {f"trainor.optim_params.lr={rate}", f"model.loss.tau={tau}"}
        assert given <= set(record["words"])
        assert record["done"] == ["train", "ensemble"]
        lines = (tmp_path / "ckpt/s" / name / METRICS).read_text().splitlines()
        assert trial.value == json.loads(lines[3])["validation_loss"]
    best = min(trials, key=lambda one: float(one.value or 0))
    assert told[-1].startswith(f"Best of 4: validation_loss {best.value:.6g} (lower is better), ")
    assert best.user_attrs["run"] in told[-1]


def test_later_trials_are_nearer_to_the_best(tmp_path: Path) -> None:
    """1e-3 is the optimum; random rates are one decade away on average."""
    space = plan_search(CONFIG, [*WORDS, f"ckpt_dir={tmp_path}", "name=s"])
    away = []
    with opened(space, trials=40, metric="validation_zero_shot_auroc") as one:
        while (run := one.another()) is not None:
            assert isinstance(run, Planned)
            away.append(abs(math.log10(run.config.trainor.optim_params["lr"]) + 3))
            write_scores(run, [1 - away[-1], -1.0])
            assert one.ended(run, None) is None
        assert f"auroc {1 - min(away):.6g} (higher is better)" in one.best()
    assert sum(away[20:]) / 20 < 0.7
    assert min(away) < 0.1


def write_scores(run: Planned, scores: list[float]) -> None:
    run.run_dir.mkdir(parents=True)
    lines = [{"seed": 0, "step": 1, "validation_zero_shot_auroc": score} for score in scores]
    (run.run_dir / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "text",
    ["", "no line", '{"seed": 0, "step": 1}', "1" + "0" * 400, "true", '"0.5"', "NaN", "1e999"],
)
def test_non_finite_scores_are_ignored(tmp_path: Path, text: str) -> None:
    space = plan_search(CONFIG, [*WORDS, f"ckpt_dir={tmp_path}", "name=s"])
    with opened(space, trials=1, metric="validation_zero_shot_auroc") as one:
        run = one.another()
        assert isinstance(run, Planned)
        write_scores(run, [])
        line = '{"seed": 0, "step": 1, "validation_zero_shot_auroc": ' + text + "}\n"
        (run.run_dir / METRICS).write_text(line)
        assert "no finite validation_zero_shot_auroc" in str(one.ended(run, None))
        assert one.best() == ""


def test_a_repeated_search_does_nothing_and_more_trials_continue(tmp_path: Path) -> None:
    search(tmp_path, trials=3)
    told: list[str] = []
    search(tmp_path, trials=3, report=told.append)
    assert told[0] == "finished already: 3 of 3 runs"
    assert len(told) == 2
    assert search(tmp_path, trials=8).count == 8
    whole = tmp_path / "whole"
    whole.mkdir()
    search(whole, trials=8)
    assert rates(tmp_path) == rates(whole)


def test_another_seed_tries_other_values(tmp_path: Path) -> None:
    search(tmp_path, trials=2)
    other = tmp_path / "other"
    other.mkdir()
    search(other, [*WORDS[:2], "trainor.seed=1"], trials=2)
    assert not set(rates(tmp_path)) & set(rates(other))


def test_a_killed_search_ends_with_the_trials_of_an_uninterrupted_one(tmp_path: Path) -> None:
    generator = random.Random(1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PAUSE": "0.03"}
    for attempt in range(3):
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path)],
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert driver.stdout is not None
        driver.stdout.readline()  # it has started
        time.sleep(generator.uniform(0, 0.5))
        driver.send_signal(signal.SIGKILL if attempt % 2 == 0 else signal.SIGTERM)
        driver.wait(timeout=60)
        driver.stdout.close()
    with open(tmp_path / "ckpt/s" / STUDY, "ab") as journal:
        journal.write(b'{"op_code": 4, "stu')  # as after a power failure
    lock = tmp_path / "ckpt/s" / f"{STUDY}.lock"
    lock.unlink(missing_ok=True)  # a kill may have left it
    lock.symlink_to("study")
    search(tmp_path, trials=8)
    whole = tmp_path / "whole"
    whole.mkdir()
    search(whole, trials=8)
    killed, never = trials_of(tmp_path), trials_of(whole)
    assert [(one.params, one.value) for one in killed] == [(o.params, o.value) for o in never]
    assert len(list((tmp_path / "ckpt/s").glob("trial=*"))) == 8


def test_several_trials_at_a_time(tmp_path: Path) -> None:
    search(tmp_path, trials=7, jobs=3)
    assert [one.state.name for one in trials_of(tmp_path)] == ["COMPLETE"] * 7


def test_failures_are_listed_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIVERGES_ABOVE", "1e-3")
    told: list[str] = []
    with pytest.raises(VilmedicError) as caught:
        search(tmp_path, trials=8, report=told.append)
    states = [one.state.name for one in trials_of(tmp_path)]
    failed = states.count("FAIL")
    assert 0 < failed < 8
    assert f"{failed} of 8 runs failed, {8 - failed} finished" in str(caught.value)
    assert "train: status 1, error: the loss is not finite" in str(caught.value)
    assert told[-1].startswith(f"Best of {8 - failed}: ")
    monkeypatch.delenv("DIVERGES_ABOVE")
    search(tmp_path, trials=8)
    trials = trials_of(tmp_path)
    assert len(trials) == 8 + failed  # optuna finishes a trial once
    last = {one.user_attrs["run"]: one for one in trials}
    assert [one.state.name for one in last.values()] == ["COMPLETE"] * 8


def test_a_run_without_a_score_is_a_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORELESS", "1")
    with pytest.raises(VilmedicError, match="its evaluations gave no finite validation_loss"):
        search(tmp_path, trials=1)


def test_incompatible_values_are_a_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilmedic.comparison.grid.MOST_CORNERS", 1)  # check each value alone
    prompts = ROOT / "config/phantom/prompts-impression.yml"
    words = [
        "trainor.early_stop_metric=validation_loss,validation_zero_shot_auroc",
        f"validator.metrics={{zero_shot: {{prompts: {prompts}}}}},{{knn: }}",
        "trainor.seed=0",
    ]
    with pytest.raises(VilmedicError) as caught:
        search(tmp_path, words, trials=8)
    assert "given 'validation_zero_shot_auroc', but" in str(caught.value)
    states = {one.state.name for one in trials_of(tmp_path)}
    assert states == {"COMPLETE", "FAIL"}


def test_the_study_survives_the_loss_of_its_file(tmp_path: Path) -> None:
    search(tmp_path, trials=3)
    before = [(one.params, one.value) for one in trials_of(tmp_path)]
    (tmp_path / "ckpt/s" / STUDY).unlink()
    told: list[str] = []
    search(tmp_path, trials=3, report=told.append)
    assert [(one.params, one.value) for one in trials_of(tmp_path)] == before
    assert len(told) == 1  # no run was started


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainor.optim_params.lr=log(1e-4,1e-1)", *WORDS[1:]], r"lr: there log\(1e-05,0.1\)"),
        ([*WORDS, "trainor.epochs=3"], "configuration: there "),
        ([*WORDS[:1], "trainor.seed=0"], "model.loss.tau: there "),
    ],
)
def test_a_different_search_in_the_same_folder_is_refused(
    tmp_path: Path, words: list[str], expected: str
) -> None:
    search(tmp_path, trials=1)
    with pytest.raises(ConfigError, match=f"holds another search .*{expected}"):
        search(tmp_path, words, trials=1)


@pytest.mark.parametrize("content", ["no JSON\n{}\n", "[1]\n", "{}\n", '{"op_code": 77}\n'])
def test_a_damaged_study_is_refused(tmp_path: Path, content: str) -> None:
    search(tmp_path, trials=1)
    (tmp_path / "ckpt/s" / STUDY).write_text(content)
    with pytest.raises(ConfigError, match=r"study\.journal: cannot be read"):
        search(tmp_path, trials=1)


def test_a_folder_in_place_of_the_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt/s" / STUDY).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"study\.journal: is a folder"):
        search(tmp_path, trials=1)


def test_two_processes_cannot_run_the_same_search(tmp_path: Path) -> None:
    (tmp_path / "ckpt/s").mkdir(parents=True)
    with (
        FileLock(tmp_path / "ckpt/s/.search.lock"),
        pytest.raises(ConfigError, match="another process is at this search"),
    ):
        search(tmp_path, trials=1)


def test_integer_ranges(tmp_path: Path) -> None:
    words = ["trainor.batch_size=int(8,16)", "trainor.epochs=lin(1,3,3)", "trainor.seed=0"]
    search(tmp_path, words, trials=4)
    for one in trials_of(tmp_path):
        assert one.params["trainor.batch_size"] in range(8, 17)
        assert one.params["trainor.epochs"] in ("1", "2", "3")


def test_the_command_checks_everything_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [CONFIG, "trainor.optim_params.lr=log(1e-5,1e-1)", f"ckpt_dir={tmp_path}", "name=s"]
    options = ["--search", "optuna", "--trials", "4"]
    assert cli.sweep([*words, *options, "--check"]) == 0
    printed = capsys.readouterr().out
    assert "4 trials of trainor.optim_params.lr for validation_zero_shot_auroc (higher" in printed
    assert cli.sweep([*words, *options, "trainor.batch_size=int(0,8)", "--check"]) == 2
    assert "trainor.batch_size (command line): given 0" in capsys.readouterr().err
    assert cli.sweep([*words, *options, "--metric", "validation_los"]) == 2
    assert "--metric: given 'validation_los'" in capsys.readouterr().err
    assert cli.sweep([CONFIG, *options]) == 2
    assert "--search: nothing varies" in capsys.readouterr().err
    assert cli.sweep([*words, "--search", "optuna"]) == 2
    assert "--search: allowed: --trials N" in capsys.readouterr().err
    assert cli.sweep([*words, *options, "--slurm"]) == 2
    assert "--slurm: is for a grid" in capsys.readouterr().err
    assert cli.sweep([*words, "--trials", "3"]) == 2
    assert "--trials: belongs to --search" in capsys.readouterr().err
    monkeypatch.setattr("vilmedic.cli.find_spec", lambda name: None)
    assert cli.sweep([*words, *options]) == 2
    assert "which the extra [optuna] brings" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_passes_the_search_to_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Sweep] = []
    monkeypatch.setattr(Sweep, "start", lambda run: started.append(run))
    words = [CONFIG, "trainor.optim_params.lr=log(1e-5,1e-1)", f"ckpt_dir={tmp_path}", "name=s"]
    assert cli.sweep([*words, "--search", "optuna", "--trials", "1"]) == 0
    assert started[0].report is cli.print_text
    assert started[0].another.__name__ == "another"


def test_searching_needs_no_torch() -> None:
    script = "import sys; import vilmedic.comparison.search; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
