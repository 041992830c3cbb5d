from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import vilmedic
from tests.export.exports import convirt, evaluate, save_run
from tests.export.hub import Hub, serve, use

SHUFFLENET = ("shufflenet_v2_x0_5", 1024)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ConVIRT run in `run` and its export in `out`."""
    folder = tmp_path_factory.mktemp("export")
    save_run(folder / "run", convirt(*SHUFFLENET))
    evaluate(folder / "run", 0.75)
    vilmedic.load(folder / "run", device="cpu").export(folder / "out")
    return folder


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the export."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A fake hub server, which huggingface_hub connects to."""
    with serve() as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server
