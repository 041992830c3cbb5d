from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vilmedic import cli
from vilmedic.log import LOGGER

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a script of bin/ as a user would and return what it printed."""

    def run_script(script: str, *arguments: object, status: int = 0) -> Run:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        shown = f"$ {script} {' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == status, shown
        return done

    return run_script


@pytest.fixture(scope="session")
def run_here() -> Run:
    """Like `run`, but in this process, which saves the time to import torch.

    At least one test of each script must use `run`; the others use this.
    """
    commands = {"bin/train.py": cli.train, "bin/ensemble.py": cli.ensemble}

    def run_command(script: str, *arguments: object, status: int = 0) -> Run:
        words = list(map(str, arguments))
        out, err = io.StringIO(), io.StringIO()
        before = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
        LOGGER.handlers.clear()  # the command then opens its console on the captured streams
        folder = Path.cwd()
        os.chdir(ROOT)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = commands[script](words)
        finally:
            os.chdir(folder)
            LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = before
        done = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
        shown = f"{script} {' '.join(words)}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == status, shown
        return done

    return run_command


@pytest.fixture(scope="session")
def phantom(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom data set with 48, 17 and 16 samples."""
    root = tmp_path_factory.mktemp("data") / "phantom"
    sizes = ["--train", 48, "--validate", 17, "--test", 16, "--size", 64, "--seed", 3]
    run("data/make_phantom.py", "--root", root, *sizes)
    return root


@pytest.fixture(scope="session")
def tiny(phantom: Path) -> list[str]:
    """Arguments of both commands for a small ConVIRT on the phantom data set."""
    return [
        "config/phantom/convirt.yml",
        f"dataset.image.root={phantom}",
        f"dataset.seq.root={phantom}",
        f"dataset.label.root={phantom}",
        "dataset.image.resize=32",
        "dataset.image.crop=32",
        "model.encoder.hidden_size=32",
        "model.encoder.intermediate_size=32",
        "model.encoder.num_attention_heads=2",
        "model.encoder.num_hidden_layers=1",
        "model.projection.textual_embedding_dim=32",
        "model.projection.projection_dim=16",
        "trainor.batch_size=8",
        "trainor.num_workers=0",
        "ensemblor.num_workers=0",
        "trainor.precision=fp32",
        "trainor.log_every=1",
    ]
