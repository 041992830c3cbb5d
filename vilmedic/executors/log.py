"""Where the numbers of a run go: console, metrics.jsonl, timing.jsonl and TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from vilmedic.launch import is_main_process

LOGGER = logging.getLogger("vilmedic")


def start_console() -> None:
    """Send the project's messages to standard output, one line each, from the main process."""
    if LOGGER.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    LOGGER.propagate = False


class MetricsLog:
    """The numbers of one run of a run directory.

    `metrics.jsonl` holds what follows from configuration and seed alone, so that two runs with the
    same seed write the same lines; whatever depends on the clock goes to `timing.jsonl`. Each line
    carries the seed of its run, since runs of several seeds share a directory.

    Args:
        run_dir: the directory of the run.
        seed: the run's seed.
        step: optimizer steps done; lines of this seed beyond it are cut off, which on resume
            removes what was logged after the checkpoint was written.
        lines: lines of this seed in `metrics.jsonl` then; those beyond are cut off as well, since
            an evaluation adds a line to the last step of its epoch.

    Attributes:
        lines: lines of this seed in `metrics.jsonl` by now.
    """

    def __init__(self, run_dir: Path, seed: int, step: int, lines: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._seed = seed
        self._paths = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "timing")}
        self._pending: dict[str, list[str]] = {name: [] for name in self._paths}
        self.lines = _cut_back(self._paths["metrics"], seed, step, lines)
        _cut_back(self._paths["timing"], seed, step)
        purge = step + 1 if step else None
        board = run_dir / "tensorboard" / str(seed)
        self._board: SummaryWriter | None = SummaryWriter(str(board), purge_step=purge)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Add a line of numbers that do not depend on time."""
        self.lines += 1
        self._write("metrics", step, values)

    def timing(self, step: int, values: dict[str, Any]) -> None:
        """Add a line of numbers that depend on time."""
        self._write("timing", step, {"time": round(time.time(), 3), **values})

    def close(self) -> None:
        """Flush what is buffered."""
        if self._board is not None:
            self._board.close()

    def flush(self) -> None:
        """Bring every line to the disk.

        Raises:
            OSError: the disk does not take them; they are kept and tried again with the next.
        """
        for name, path in self._paths.items():
            self._append(name)
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())

    def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
        self._pending[name].append(json.dumps({"seed": self._seed, "step": step, **values}) + "\n")
        try:
            self._append(name)
        except OSError as error:
            LOGGER.warning("The numbers of step %d wait for room on the disk: %s", step, error)
        self._draw(step, values)

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

    def _draw(self, step: int, values: dict[str, Any]) -> None:
        """Give the numbers to TensorBoard, as long as it can write."""
        if self._board is None:
            return
        try:
            for key, value in values.items():
                if isinstance(value, int | float) and key not in ("epoch", "time"):
                    self._board.add_scalar(key, value, step)
        except OSError as error:
            LOGGER.warning("The TensorBoard log ends at step %d: %s", step, error)
            self._board = None


def _cut_back(path: Path, seed: int, step: int, lines: int | None = None) -> int:
    """Drop the lines of a seed that were logged after a checkpoint, and one cut short by a crash.

    Returns:
        How many lines of the seed are left.
    """
    if not path.exists():
        return 0
    kept, own = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["seed"] == seed:
            if entry["step"] > step or (lines is not None and own >= lines):
                continue
            own += 1
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
    return own
