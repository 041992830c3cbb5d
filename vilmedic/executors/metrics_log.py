"""Where the numbers of a run go: metrics.jsonl, timing.jsonl and loggers by name."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vilmedic.executors.log import LOGGER
from vilmedic.loggers.contract import Logger, Run

UNPLOTTED = ("epoch", "time")


class MetricsLog:
    """The numbers of one run of a run directory.

    `metrics.jsonl` holds what follows from configuration and seed alone, so that two runs with the
    same seed write the same lines; whatever depends on the clock or the machine goes to
    `timing.jsonl`. Each line carries the seed of its run, since runs of several seeds share a
    directory. A logger that fails later on is left out with a warning: numbers are in the files.

    Args:
        run: the run; lines of its seed beyond its step are cut off, which on resume removes what
            was logged after the checkpoint was written.
        loggers: name and logger of each further place that numbers go to.

    Raises:
        ConfigError: a logger cannot be started.
    """

    def __init__(self, run: Run, loggers: Iterable[tuple[str, Logger]] = ()) -> None:
        self._seed = run.seed
        self._paths = {name: run.run_dir / f"{name}.jsonl" for name in ("metrics", "timing")}
        for path in self._paths.values():
            _cut_back(path, run.seed, run.step)
        self._loggers: dict[str, Logger] = {}
        for name, logger in loggers:
            logger.open(run)
            self._loggers[name] = logger

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Add a line of numbers that do not depend on time."""
        self._write("metrics", step, values)

    def timing(self, step: int, values: dict[str, Any]) -> None:
        """Add a line of numbers that depend on time or on the machine."""
        self._write("timing", step, {"time": round(time.time(), 3), **values})

    def close(self) -> None:
        """Flush what is buffered."""
        for name, logger in list(self._loggers.items()):
            self._guarded(name, logger.close)

    def _write(self, file: str, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"seed": self._seed, "step": step, **values})
        with open(self._paths[file], "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        scalars = {
            key: float(value)
            for key, value in values.items()
            if isinstance(value, int | float) and key not in UNPLOTTED
        }
        for name, logger in list(self._loggers.items()):
            self._guarded(name, logger.scalars, step, scalars)

    def _guarded(self, name: str, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            LOGGER.warning("The logger %s is left out from here on: %s", name, error)
            self._loggers.pop(name, None)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none without a file, and none that a crash cut short."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "seed" in entry and "step" in entry:
            entries.append(entry)
    return entries


def _cut_back(path: Path, seed: int, step: int) -> None:
    """Drop the lines of a seed that were logged after a step, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["seed"] != seed or line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
