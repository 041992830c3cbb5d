"""Sweeps with a stub training command, which writes one line per step and resumes after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vilmedic import cli
from vilmedic.comparison.grid import Planned, plan
from vilmedic.comparison.sweep import (
    LOG,
    RECORD,
    Sweep,
    digest,
    slurm_script,
    visible_gpus,
)
from vilmedic.errors import ConfigError, VilmedicError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "config/phantom/convirt.yml")
TRAINING = """\
import os, sys, time
from pathlib import Path
step, config, *words = sys.argv[1:]
values = dict(word.split("=", 1) for word in words)
folder = Path(values["folder"])
device, threads = map(os.environ.get, ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
print(step, "on", device, "threads", threads)
if step in values.get("fails", "").split("+"):
    sys.exit("error: the data is gone")
if step == "ensemble":
    (folder / "results.txt").write_text(str(len((folder / "steps.txt").read_text().split())))
    sys.exit()
steps = folder / "steps.txt"
assert values["ckpt"] == "auto"
done = len(steps.read_text().split()) if steps.exists() else 0
for number in range(done, 6):
    time.sleep(float(values.get("pause", 0)))
    with open(steps, "a") as file:
        file.write(f"{number}\\n")
"""
DRIVER = """\
import sys
from pathlib import Path
from tests.comparison.test_sweep import planned, sweep
from vilmedic.errors import Interrupted
folder = Path(sys.argv[1])
try:
    sweep(folder, planned(folder, 6, pause=0.1), jobs=2).start()
except Interrupted as stop:
    sys.exit(stop.status)
"""


@dataclass
class Config:
    """The parts of a configuration that a sweep reads."""

    run_dir: Path
    text: str
    trainor: Any

    def to_yaml(self) -> str:
        return self.text


def planned(folder: Path, count: int, *, device: str | None = None, **words: Any) -> list[Planned]:
    runs = []
    for number in range(count):
        run_dir = folder / f"run{number}"
        config = Config(run_dir, f"run {number}", SimpleNamespace(device=device))
        own = {**words, "folder": run_dir, "ckpt": "auto"}
        given = tuple(f"{key}={value}" for key, value in own.items())
        runs.append(Planned(f"s/run{number}", given, config))  # type: ignore[arg-type]
    return runs


def sweep(folder: Path, runs: list[Planned], **options: Any) -> Sweep:
    script = folder / "training.py"
    if not script.exists():
        script.write_text(TRAINING)

    def command(step: str) -> list[str]:
        return [sys.executable, str(script), step]

    return Sweep("c.yml", runs, command=command, **options)


def results(folder: Path) -> dict[str, list[str]]:
    files = ("steps.txt", "results.txt")
    return {
        path.name: [(path / name).read_text() for name in files]
        for path in sorted(folder.glob("run*"))
    }


def test_each_run_is_trained_and_evaluated(tmp_path: Path) -> None:
    told: list[str] = []
    sweep(tmp_path, planned(tmp_path, 3), report=told.append).start()
    assert results(tmp_path) == {f"run{k}": ["0\n1\n2\n3\n4\n5\n", "6"] for k in range(3)}
    assert told[:3] == ["s/run0: train", "s/run0: ensemble", "s/run0: evaluated"]
    assert json.loads((tmp_path / "run0" / RECORD).read_text())["done"] == ["train", "ensemble"]
    told.clear()
    sweep(tmp_path, planned(tmp_path, 4), report=told.append).start()
    assert told[0] == "finished already: 3 of 4 runs"
    assert not any(line.startswith("s/run0") for line in told)


def test_evaluation_can_follow_later(tmp_path: Path) -> None:
    sweep(tmp_path, planned(tmp_path, 1), evaluate=False).start()
    assert not (tmp_path / "run0/results.txt").exists()
    told: list[str] = []
    sweep(tmp_path, planned(tmp_path, 1), report=told.append).start()
    assert told == ["s/run0: ensemble", "s/run0: evaluated"]


@pytest.mark.parametrize("step", ["train", "ensemble"])
def test_a_failure_does_not_stop_the_others(tmp_path: Path, step: str) -> None:
    runs = [*planned(tmp_path, 1, fails=step), *planned(tmp_path, 3)[1:]]
    one = sweep(tmp_path, runs, report=lambda line: None)
    with pytest.raises(VilmedicError) as caught:
        one.start()
    assert "1 of 3 runs failed, 2 finished" in str(caught.value)
    assert f"s/run0: {step}: status 1, error: the data is gone" in str(caught.value)
    assert [(tmp_path / f"run{k}/results.txt").exists() for k in range(3)] == [False, True, True]
    sweep(tmp_path, planned(tmp_path, 3), report=lambda line: None).start()
    assert results(tmp_path)["run0"] == ["0\n1\n2\n3\n4\n5\n", "6"]


def test_a_killed_sweep_resumes_to_the_same_end(tmp_path: Path) -> None:
    """Killed at any moment, with SIGKILL or with a signal that it handles."""
    generator = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    statuses = []
    for attempt in range(4):
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert driver.stdout is not None
        driver.stdout.readline()  # it has started
        time.sleep(generator.uniform(0, 0.4))
        driver.send_signal(signal.SIGKILL if attempt % 2 else signal.SIGTERM)
        statuses.append(driver.wait(timeout=60))
        driver.stdout.close()
    assert statuses[0] == 143  # later ones may complete before the signal
    assert set(statuses) <= {-signal.SIGKILL, -signal.SIGTERM, 143, 0}
    sweep(tmp_path, planned(tmp_path, 6, pause=0.1), report=lambda line: None).start()
    assert results(tmp_path) == {f"run{k}": ["0\n1\n2\n3\n4\n5\n", "6"] for k in range(6)}


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    sweep(tmp_path, planned(tmp_path, 1), report=lambda line: None).start()
    (run,) = planned(tmp_path, 1)
    run.config.text = "changed"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="run0: holds a run of another configuration"):
        sweep(tmp_path, [run]).start()


@pytest.mark.parametrize("content", ["", "[]", "\xff{", "[" * 100_000, '{"done": ["train"'])
def test_a_damaged_record_starts_the_run_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "run0").mkdir()
    (tmp_path / "run0" / RECORD).write_text(content)
    sweep(tmp_path, planned(tmp_path, 1), report=lambda line: None).start()
    assert json.loads((tmp_path / "run0" / RECORD).read_text())["done"] == ["train", "ensemble"]


@pytest.mark.parametrize("done", [None, 5, "train", {"train": 1}, [["train"]]])
def test_an_invalid_record_does_not_count_as_finished(tmp_path: Path, done: Any) -> None:
    (run,) = planned(tmp_path, 1)
    run.run_dir.mkdir()
    record = {"configuration": digest(run), "done": done}
    (run.run_dir / RECORD).write_text(json.dumps(record))
    sweep(tmp_path, [run], report=lambda line: None, evaluate=False).start()
    assert (run.run_dir / "steps.txt").exists()


@pytest.mark.parametrize("name", ["run0", f"run0/{LOG}", f"run0/{RECORD}"])
def test_a_folder_that_cannot_be_written_is_a_failed_run(tmp_path: Path, name: str) -> None:
    if name == "run0":
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name).mkdir(parents=True)
    one = sweep(tmp_path, planned(tmp_path, 2), report=lambda line: None)
    with pytest.raises(VilmedicError, match="1 of 2 runs failed, 1 finished"):
        one.start()
    assert list(one.failures) == ["s/run0"]
    assert (tmp_path / "run1/results.txt").exists()


def test_one_process_per_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert visible_gpus() == ["3", "5"]
    sweep(tmp_path, planned(tmp_path, 4), report=lambda line: None, evaluate=False).start()
    logs = [(tmp_path / f"run{k}" / LOG).read_text() for k in range(4)]
    assert {log.split()[2] for log in logs} == {"3", "5"}
    assert logs[0] == "train on 3 threads None\n"
    assert logs[1] == "train on 5 threads None\n"


def test_cpu_processes_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("vilmedic.comparison.sweep.core_count", lambda: 8)
    sweep(tmp_path, planned(tmp_path, 2), jobs=2, report=lambda line: None, evaluate=False).start()
    assert (tmp_path / "run0" / LOG).read_text() == "train on  threads 4\n"


def test_a_run_with_a_configured_device_gets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    runs = planned(tmp_path, 1, device="cuda:1")
    sweep(tmp_path, runs, report=lambda line: None, evaluate=False).start()
    assert (tmp_path / "run0" / LOG).read_text().startswith("train on 3,5 ")


def test_the_array_script_has_a_task_for_each_run(tmp_path: Path) -> None:
    runs = plan(CONFIG, ["trainor.seed=0,1,2", "model.loss.tau=0.1,0.2", "name=a b"])
    script = tmp_path / "sweep.sh"
    script.write_text(slurm_script("c d.yml", runs, jobs=2, evaluate=True))
    assert "#SBATCH --array=0-5%2\n" in script.read_text()
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/bash\nprintf "%s|" "$@"; echo\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, check=True
    )
    train, ensemble = [line.split("|")[1:-1] for line in done.stdout.splitlines()]
    assert train[0].endswith("train.py")
    assert ensemble[0].endswith("ensemble.py")
    assert train[1:] == ensemble[1:] == ["c d.yml", *runs[3].words]


def test_the_command_checks_everything_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [CONFIG, "trainor.seed=0,1", f"ckpt_dir={tmp_path}", "name=s"]
    assert cli.sweep([*words, "trainor.epochs=1,x"]) == 2
    assert "trainor.epochs (command line)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert cli.sweep([*words, "--slurm", "--no-evaluate"]) == 0
    assert f"Written: {tmp_path}/s/sweep.sh, 2 tasks" in capsys.readouterr().out
    assert "ensemble.py" not in (tmp_path / "s/sweep.sh").read_text()
    assert cli.sweep([*words, "--jbos", "2"]) == 2
    assert "'--jbos=2': unknown" in capsys.readouterr().err
