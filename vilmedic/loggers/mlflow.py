"""MLflow logger."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from vilmedic.errors import ConfigError
from vilmedic.loggers.contract import Logger, Run, flat, remembered

LONGEST = 500  # letters of a parameter that every MLflow server takes
AT_ONCE = 100  # parameters a call


class MLflowLogger(Logger):
    """A run of MLflow, by default in the folder `<run directory>/mlruns`.

    Args:
        experiment: the experiment that the run belongs to.
        tracking_uri: the server, or a local store such as sqlite:///mlflow.db; null takes
            MLFLOW_TRACKING_URI, or else the folder.
    """

    def __init__(self, *, experiment: str = "vilmedic", tracking_uri: str | None = None) -> None:
        self.experiment, self.tracking_uri = experiment, tracking_uri

    def open(self, run: Run) -> None:
        """Start or resume the run of the same seed.

        Raises:
            ConfigError: the store cannot be reached.
        """
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            # A folder needs no database package; MLflow wants to be told that it is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run.run_dir / "mlruns").resolve().as_uri()
        path = remembered(run, "mlflow")
        try:
            self._client = MlflowClient(tracking_uri=uri)
            if run.step and path.exists():
                self._id = path.read_text(encoding="utf-8").strip()
                self._client.update_run(self._id, status="RUNNING")
                return
            found = self._client.get_experiment_by_name(self.experiment)
            experiment = found.experiment_id if found else None
            if experiment is None:
                experiment = self._client.create_experiment(self.experiment)
            self._id = self._client.create_run(experiment, run_name=run.title).info.run_id
            parameters = [Param(key, str(value)[:LONGEST]) for key, value in flat(run.config)]
            for start in range(0, len(parameters), AT_ONCE):
                some = list(itertools.islice(parameters, start, start + AT_ONCE))
                self._client.log_batch(self._id, params=some)
        except (MlflowException, OSError) as error:
            raise ConfigError(f"trainor.loggers: mlflow cannot start at {uri}: {error}") from error
        path.write_text(f"{self._id}\n", encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of an optimizer step."""
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def figure(self, step: int, path: Path) -> None:
        """Keep a PNG file that was made at an optimizer step, under its stem and the step."""
        self._client.log_artifact(self._id, str(path), f"pictures/{path.stem}/{step}")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)
