"""Where the numbers of a run go: console, metrics.jsonl, timing.jsonl and TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LOGGER = logging.getLogger("vilmedic")


def start_console() -> None:
    """Send the project's messages to standard output, one line each."""
    if LOGGER.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
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
    """

    def __init__(self, run_dir: Path, seed: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._seed = seed
        self._paths = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "timing")}
        for path in self._paths.values():
            _cut_back(path, seed, step)
        purge = step + 1 if step else None
        self._board = SummaryWriter(str(run_dir / "tensorboard" / str(seed)), purge_step=purge)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Add a line of numbers that do not depend on time."""
        self._write("metrics", step, values)

    def timing(self, step: int, values: dict[str, Any]) -> None:
        """Add a line of numbers that depend on time."""
        self._write("timing", step, {"time": round(time.time(), 3), **values})

    def pictures(self, step: int, folder: Path) -> None:
        """Show the PNG files of a folder, if there is one, in TensorBoard."""
        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._board.add_image(path.stem, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush what is buffered."""
        self._board.close()

    def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"seed": self._seed, "step": step, **values})
        with open(self._paths[name], "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        for key, value in values.items():
            if isinstance(value, int | float) and key not in ("epoch", "time"):
                self._board.add_scalar(key, value, step)


def _cut_back(path: Path, seed: int, step: int) -> None:
    """Drop the lines of a seed that were logged after a step, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["seed"] != seed or entry["step"] <= step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
