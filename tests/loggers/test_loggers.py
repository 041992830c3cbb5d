from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vilmedic.config import build_calls
from vilmedic.config.load import load
from vilmedic.errors import ConfigError
from vilmedic.loggers.contract import Logger, Run, flat
from vilmedic.registry import LOGGERS

CONFIG = str(Path(__file__).parents[2] / "config/SELFSUP/simclr-mimic.yml")


def make(name: str, **options: object) -> Logger:
    [(_, logger)] = build_calls(LOGGERS, [{name: options}], "trainor.loggers")
    return logger


def use(logger: Logger, run: Run) -> None:
    logger.open(run)
    logger.scalars(run.step + 1, {"loss": 2.0, "lr": 0.1})
    logger.scalars(run.step + 2, {"loss": 1.0})
    picture = run.run_dir / "validate_grid.png"
    Image.new("L", (4, 2), 128).save(picture)
    logger.figure(run.step + 2, picture)
    logger.close()


def run_in(folder: Path, step: int = 0) -> Run:
    return Run("demo", folder, 3, step, {"trainor": {"batch_size": 4}, "plugins": []})


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    use(make("tensorboard"), run_in(tmp_path))

    events = EventAccumulator(str(tmp_path / "tensorboard" / "3"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    [picture] = events.Images("validate_grid")
    assert (picture.step, picture.width, picture.height) == (2, 4, 2)


def test_wandb_offline_writes_into_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    use(make("wandb", project="p", tags=["x"]), run_in(tmp_path))
    known = (tmp_path / "wandb_3.id").read_text().strip()
    [written] = (tmp_path / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb")
    # wandb's service process writes the files.
    words = (b"batch_size", b"demo-3", b"loss", b"validate_grid")
    deadline = time.monotonic() + 60
    while not all(word in written.read_bytes() for word in words):
        assert time.monotonic() < deadline, written.read_bytes()
        time.sleep(0.1)

    use(make("wandb", project="p"), run_in(tmp_path, step=2))
    assert (tmp_path / "wandb_3.id").read_text().strip() == known


def test_mlflow_writes_into_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    use(make("mlflow", experiment="e"), run_in(tmp_path))
    use(make("mlflow", experiment="e"), run_in(tmp_path, step=2))

    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("e")
    [found] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 2.0), (2, 1.0), (3, 2.0), (4, 1.0)]
    assert found.data.params["trainor.batch_size"] == "4"
    assert found.info.status == "FINISHED"
    pictures = client.list_artifacts(found.info.run_id, "pictures/validate_grid")
    assert [entry.path for entry in pictures] == [f"pictures/validate_grid/{n}" for n in (2, 4)]


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_logger_that_is_not_installed_is_an_error(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"vilmedic.loggers.{name}", raising=False)
    with pytest.raises(ConfigError, match=f"logger '{name}' needs the package '{package}'"):
        make(name)


def test_names_and_options_are_validated_before_the_run() -> None:
    assert load(CONFIG).trainor.loggers == ["tensorboard"]
    assert load(CONFIG, ["trainor.loggers=[]"]).trainor.loggers == []
    with pytest.raises(ConfigError, match=r"no logger named 'wand'.*Did you mean 'wandb'"):
        load(CONFIG, ["trainor.loggers=[wand]"])
    with pytest.raises(ConfigError, match=r"projekt.*project"):
        load(CONFIG, ["trainor.loggers=[{wandb: {projekt: x}}]"])


def test_config_is_flattened() -> None:
    assert dict(flat({"a": {"b": 1, "c": [1, 2]}, "d": None})) == {
        "a.b": 1,
        "a.c": [1, 2],
        "d": None,
    }
