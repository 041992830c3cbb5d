"""Whole commands in two processes: files, resuming, kills and messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.crash.killing import assert_same_runs
from tests.crash.systems import CONVIRT, DALLE, GLORIA, System
from tests.several_processes import ROOT, finish, start_command
from vilmedic.phantom.write import Plan, build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "data"
    build(root, Plan(train=21, validate=9, test=7, size=32), force=False, workers=1)
    return root


def words(system: System, data: Path, ckpt_dir: Path, *more: str) -> list[str]:
    """Arguments of a training command of two epochs."""
    fixed = ["trainor.num_workers=0", "ensemblor.num_workers=0", "trainor.epochs=2"]
    return [*system.arguments(data), f"ckpt_dir={ckpt_dir}", "name=run", *fixed, *more]


def train(system: System, data: Path, folder: Path, *more: str, world: int = 2) -> Path:
    arguments = words(system, data, folder, *more)
    finish(start_command(arguments, folder, world=world), folder)
    return folder / "run"


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes."""
    return train(CONVIRT, data, tmp_path_factory.mktemp("whole"), "ckpt=auto")


def silent(text: str) -> bool:
    """Whether a process printed nothing."""
    return all(line.startswith("[rank1]:[W") for line in text.splitlines())


def _unwrapped(path: Path) -> str:
    """The output of a process without line wrapping."""
    return " ".join(path.read_text().split())


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_only_one_process_writes(reference: Path) -> None:
    names = sorted(path.name for path in reference.iterdir())
    assert "last_3.pth" in names
    assert sum(name.startswith("config_") for name in names) == 1
    assert len(list((reference / "tensorboard" / "3").iterdir())) == 1
    steps = [step for step, _ in losses(reference)]
    assert steps == sorted(set(steps))
    console = [(reference.parent / f"output_{rank}.txt").read_text() for rank in range(2)]
    assert "2 processes (ddp): each takes about 2 of the 4 samples of a batch" in console[0]
    assert "Finished after 2 epochs" in console[0]
    assert silent(console[1])


def test_killed_runs_resume_exactly(data: Path, reference: Path, tmp_path: Path) -> None:
    """Both processes are killed; then only one is, and the other exits."""
    for step, killed in ((1, (0, 1)), (3, (1,))):
        running = start_command(words(CONVIRT, data, tmp_path, "ckpt=auto"), tmp_path)
        _wait_for_step(tmp_path / "run" / "metrics.jsonl", step)
        for rank in killed:
            running[rank].kill()
        for rank, process in enumerate(running):
            process.join(200)
            expected = -signal.SIGKILL if rank in killed else 1
            assert process.exitcode == expected
    assert "another process of this run has ended" in (tmp_path / "output_0.txt").read_text()
    train(CONVIRT, data, tmp_path, "ckpt=auto")
    assert_same_runs(tmp_path / "run", reference)


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    data: Path, reference: Path, tmp_path: Path
) -> None:
    arguments = words(CONVIRT, data, tmp_path, "ckpt=auto", "trainor.save_every=null")
    running = start_command(arguments, tmp_path)
    _wait_for_step(tmp_path / "run" / "metrics.jsonl", 1)
    os.kill(running[1].pid, signal.SIGTERM)
    finish(running, tmp_path, 143)
    assert "last_3.pth holds the state" in (tmp_path / "output_0.txt").read_text()
    finish(start_command(arguments, tmp_path), tmp_path)
    assert_same_runs(tmp_path / "run", reference, same_saves=False)


STILL = (
    "model.encoder.hidden_dropout_prob=0",
    "model.encoder.attention_probs_dropout_prob=0",
    "model.cnn.freeze=true",
    "trainor.lr_decay=null",  # its length depends on the number of epochs
    "trainor.optimizer=SGD",
    "trainor.optim_params={lr: 0.01, momentum: 0.9}",
    "ckpt=auto",
)
"""No dropout or batch statistics, so that the number of processes does not affect the results."""


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs in one process."""
    folder = tmp_path_factory.mktemp("one")
    return train(CONVIRT, data, folder, *STILL, "trainor.epochs=3", world=1)


@pytest.mark.parametrize(("parallel", "worlds"), [("ddp", (1, 2, 1)), ("fsdp", (2, 1, 2))])
def test_the_number_of_processes_can_change_on_resume(
    data: Path, one_process: Path, tmp_path: Path, parallel: str, worlds: tuple[int, ...]
) -> None:
    """Each resumes what the other has saved; all equal the run in one process."""
    expected = one_process
    for epochs, world in enumerate(worlds, start=1):
        more = (*STILL, f"trainor.parallel={parallel}", f"trainor.epochs={epochs}")
        given = train(CONVIRT, data, tmp_path, *more, world=world)
    one, other = losses(expected), losses(given)
    assert [step for step, _ in one] == [step for step, _ in other]
    torch.testing.assert_close(
        torch.tensor([loss for _, loss in other]), torch.tensor([loss for _, loss in one])
    )
    states = [torch.load(one / "last_3.pth", weights_only=True) for one in (expected, given)]
    for key in ("model", "ema"):
        for name, value in states[0][key].items():
            torch.testing.assert_close(states[1][key][name], value, rtol=1e-3, atol=1e-4)


def test_frozen_encoders_are_computed_once_for_all_processes(data: Path, tmp_path: Path) -> None:
    """The first process computes them; if it cannot store them, all train without a cache."""
    still = (*STILL, "model.encoder.freeze=true", "dataset.image.preset=center_crop")
    still = (*still, "~dataset.image.transforms", "trainor.epochs=1")
    one = train(CONVIRT, data, tmp_path / "one", *still, "trainor.frozen_cache_gib=0", world=1)
    two = train(CONVIRT, data, tmp_path / "two", *still)
    full = train(CONVIRT, data, tmp_path / "full", *still, "trainor.frozen_cache_gib=1e-7")
    for run_dir in (two, full):
        torch.testing.assert_close(
            torch.tensor([loss for _, loss in losses(run_dir)]),
            torch.tensor([loss for _, loss in losses(one)]),
        )
    files = sorted(path.name for path in (two / "features").glob("*.npy"))
    assert sum(not name.startswith(".") for name in files) == 4
    told = _unwrapped(two.parent / "output_0.txt")
    assert told.count(": computed once for 21 samples") == 2
    assert list((full / "features").glob("[tv]*")) == []
    assert "are not kept: they take" in _unwrapped(full.parent / "output_0.txt")
    assert silent((two.parent / "output_1.txt").read_text())


def test_sharded_dalle_equals_one_process(data: Path, tmp_path: Path) -> None:
    """The frozen VAE that makes the tokens is not sharded; one process resumes the run."""
    still = (
        "model.dalle.depth=2",
        "model.dalle.attn_dropout=0",
        "model.dalle.ff_dropout=0",
        "model.dalle.null_cond_prob=0",
        *STILL[3:],
    )
    one = train(DALLE, data, tmp_path / "one", *still, world=1)
    more = (*still, "trainor.parallel=fsdp", "trainor.activation_checkpointing=true")
    for epochs, world in ((1, 2), (2, 1)):
        given = train(DALLE, data, tmp_path / "two", *more, f"trainor.epochs={epochs}", world=world)
    torch.testing.assert_close(
        torch.tensor(losses(given)), torch.tensor(losses(one)), rtol=1e-5, atol=1e-6
    )


def test_evaluation_in_two_processes_gives_the_same_results(data: Path, tmp_path: Path) -> None:
    """Every number of the results file and every figure, local similarity included."""
    train(GLORIA, data, tmp_path, world=1)
    more = (
        "ensemblor.splits=[validate,test]",
        "ensemblor.metrics={retrieval: {similarity: both}, knn: {k: 3}}",
        "ensemblor.batch_size=4",
        "ensemblor.baselines=[raw_pixels]",
        "ensemblor.post_processing={plot_attention: {num_samples: 1}}",
        "ensemblor.device=cpu",
    )
    arguments = words(GLORIA, data, tmp_path, *more)
    found = []
    for world in (1, 2):
        folder = tmp_path / f"ensemble{world}"
        finish(start_command(arguments, folder, script="ensemble", world=world), folder)
        texts = [tmp_path / "run" / f"results_{split}.json" for split in ("validate", "test")]
        found.append([path.read_text() for path in texts])
        assert len(list((tmp_path / "run").glob("evaluations/*/*attention*.png"))) > 1
    assert found[0] == found[1]
    assert silent((tmp_path / "ensemble2" / "output_1.txt").read_text())


def test_torchrun_shows_the_first_error(data: Path, tmp_path: Path) -> None:
    """One process reads a bad image and reports it, the other exits, and torchrun fails."""
    lines = (data / "train.image.tok").read_text().splitlines()
    broken = tmp_path / "data"
    broken.mkdir()
    for path in data.glob("*.tok"):
        (broken / path.name).write_text(path.read_text())
    (broken / "images").mkdir()
    for line in {*lines, *(data / "validate.image.tok").read_text().splitlines()}:
        source = next(data.rglob(Path(line.split(",")[0]).name))
        target = broken / "images" / line.split(",")[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (broken / "images" / lines[5].split(",")[0]).write_bytes(b"no image")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "bin/train.py", *words(CONVIRT, broken, tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode != 0
    assert time.monotonic() - began < 200
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "train.image.tok:6" in errors[0]
    assert "/vilmedic/training/" not in done.stderr, "no traceback of the project"


def _wait_for_step(metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")
