"""Metric log files, metrics.jsonl and timing.jsonl, and forwarding to loggers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from vilmedic.checkpoints.run_directory import SET_ASIDE, shared
from vilmedic.errors import DataError
from vilmedic.files import no_file, replace_text
from vilmedic.log import LOGGER, counted
from vilmedic.loggers.contract import Logger

UNPLOTTED = ("epoch", "time")


class MetricsLog:
    """The numbers of one run of a run directory.

    `metrics.jsonl` holds what follows from configuration and seed alone, so that two runs with the
    same seed write the same lines; whatever depends on the clock or the machine goes to
    `timing.jsonl`. Each line carries the seed of its run, since runs of several seeds share a
    directory, and lock its files while they write. A logger that fails is left out from then on:
    the numbers are in the files.

    Args:
        run_dir: the directory of the run.
        seed: the run's seed.
        step: optimizer steps done; lines of this seed beyond it are cut off, which on resume
            removes what was logged after the checkpoint was written.
        lines: lines of this seed in `metrics.jsonl` then; those beyond are cut off as well, since
            an evaluation adds a line to the last step of its epoch.
        loggers: name and logger of each further place that numbers go to, opened before.

    Attributes:
        lines: lines of this seed in `metrics.jsonl` by now.

    Raises:
        DataError: there is something else than a file under one of the names.
    """

    def __init__(
        self,
        run_dir: Path,
        seed: int,
        step: int,
        lines: int | None = None,
        loggers: Iterable[tuple[str, Logger]] = (),
    ) -> None:
        self._seed = seed
        self._paths = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "timing")}
        self._pending: dict[str, list[str]] = {name: [] for name in self._paths}
        for path in self._paths.values():
            if (kind := no_file(path)) is not None:
                raise DataError(f"{path}: is {kind}, where the metrics of the run should be.")
        self._lock = FileLock(run_dir / ".metrics.lock", fallback_to_soft=False)
        with shared(self._lock):
            self.lines = _cut_back(self._paths["metrics"], seed, step, lines)
            _cut_back(self._paths["timing"], seed, step)
        self._loggers = list(loggers)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Add a line of numbers that do not depend on time."""
        self.lines += 1
        self._write("metrics", step, values)

    def timing(self, step: int, values: dict[str, Any]) -> None:
        """Add a line of numbers that depend on time."""
        self._write("timing", step, {"time": round(time.time(), 3), **values})

    def figures(self, step: int, folder: Path) -> None:
        """Give the PNG files of a folder, if there is one, to the loggers."""
        for path in sorted(folder.glob("*.png")):
            for one in list(self._loggers):
                self._guarded(one, one[1].figure, step, path)

    def close(self) -> None:
        """Flush what is buffered."""
        for one in list(self._loggers):
            self._guarded(one, one[1].close)

    def flush(self) -> None:
        """Flush all lines to the disk.

        Raises:
            OSError: they cannot be written; they are kept and written with the next ones.
        """
        for name, path in self._paths.items():
            with shared(self._lock):
                self._append(name)
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())

    def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
        self._pending[name].append(json.dumps({"seed": self._seed, "step": step, **values}) + "\n")
        try:
            with shared(self._lock):
                self._append(name)
        except OSError as error:
            LOGGER.warning("The numbers of step %d wait for disk space: %s", step, error)
        self._show(step, values)

    def _append(self, name: str) -> None:
        """Add the pending lines to a file, all of them or none."""
        path = self._paths[name]
        before = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as stream:
                stream.write("".join(self._pending[name]))
        except OSError:
            if path.exists():
                os.truncate(path, before)
            raise
        self._pending[name].clear()

    def _show(self, step: int, values: dict[str, Any]) -> None:
        """Give the numbers to the loggers."""
        scalars = {
            key: float(value)
            for key, value in values.items()
            if isinstance(value, int | float) and key not in UNPLOTTED
        }
        for one in list(self._loggers):
            self._guarded(one, one[1].scalars, step, scalars)

    def _guarded(self, one: tuple[str, Logger], call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            LOGGER.warning("The logger %s is left out from here on: %s", one[0], error)
            self._loggers.remove(one)


class NoLog:
    """No-op metrics log for non-main processes."""

    lines = 0

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Take a line."""

    def timing(self, step: int, values: dict[str, Any]) -> None:
        """Take a line."""

    def figures(self, step: int, folder: Path) -> None:
        """Log images."""

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Do nothing."""


def _cut_back(path: Path, seed: int, step: int, lines: int | None = None) -> int:
    """Drop the lines of a seed that were logged after a checkpoint, and damaged lines.

    A line that a crash has cut short is dropped without a word. Of a file with other lines that
    cannot be read, a copy is kept.

    Returns:
        How many lines of the seed are left.
    """
    if not path.exists():
        return 0
    from vilmedic.checkpoints.left_out import read_entries

    entries = read_entries(path)
    damaged = sum(entry is None for _, entry in entries)
    if damaged and not (damaged == 1 and entries[-1][1] is None):
        _keep_copy(path, damaged)
    kept, own = [], 0
    for _, entry in entries:
        if entry is None:
            continue
        if entry["seed"] == seed:
            if entry["step"] > step or (lines is not None and own >= lines):
                continue
            own += 1
        kept.append(json.dumps(entry))
    text = "".join(line + "\n" for line in kept)
    if text.encode() == path.read_bytes():
        return own
    try:
        replace_text(path, text, writer=f"_{seed}")
    except OSError as error:
        LOGGER.warning("%s is cut back in place: %s", path, error)
        with open(path, "r+", encoding="utf-8") as stream:  # shorter, so there is room for it
            stream.write(text)
            stream.truncate()
    return own


def _keep_copy(path: Path, damaged: int) -> None:
    folder = path.parent / SET_ASIDE
    try:
        folder.mkdir(exist_ok=True)
        shutil.copy2(path, folder / path.name)
        where = f"; the file as it was is {folder / path.name}"
    except OSError:
        where = ""
    lines = counted(damaged, "line cannot be read and is", "lines cannot be read and are")
    LOGGER.warning("%s: %s left out%s", path, lines, where)
