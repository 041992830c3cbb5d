"""Base class of loggers, and the default one: TensorBoard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Run:
    """The run whose numbers are logged.

    Args:
        name: the run's name.
        run_dir: its directory.
        seed: its seed.
        step: optimizer steps done before; above 0 when it continues.
        config: the resolved configuration.
    """

    name: str
    run_dir: Path
    seed: int
    step: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name and seed, as a list of runs shows them."""
        return f"{self.name}-{self.seed}"


class Logger(ABC):
    """A destination for numbers, besides metrics.jsonl and timing.jsonl.

    The keyword-only constructor is the schema of its options. It opens nothing: a run that does
    not start leaves nothing behind.
    """

    @abstractmethod
    def open(self, run: Run) -> None:
        """Start or resume a run that was cut off.

        Raises:
            ConfigError: the options or this machine do not allow it.
        """

    @abstractmethod
    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of an optimizer step."""

    @abstractmethod
    def figure(self, step: int, path: Path) -> None:
        """Show a PNG file that was made at an optimizer step, under its stem."""

    @abstractmethod
    def close(self) -> None:
        """Flush what is buffered."""


class TensorBoardLogger(Logger):
    """Event files in `<run directory>/tensorboard/<seed>`, for `tensorboard --logdir ckpt`."""

    def open(self, run: Run) -> None:
        """Begin; on resume what lies beyond the checkpoint is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = run.step + 1 if run.step else None
        self._writer = SummaryWriter(
            str(run.run_dir / "tensorboard" / str(run.seed)), purge_step=purge
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of an optimizer step."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def figure(self, step: int, path: Path) -> None:
        """Show a PNG file that was made at an optimizer step, under its stem."""
        with Image.open(path, formats=("PNG",)) as figure:
            pixels = np.asarray(figure.convert("RGB"))
        self._writer.add_image(path.stem, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush what is buffered."""
        self._writer.close()


def remembered(run: Run, logger: str) -> Path:
    """Return the file with a logger's run id, to continue the run after a resume."""
    return run.run_dir / f"{logger}_{run.seed}.id"


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their dotted keys; a list is one value."""
    if not isinstance(config, dict):
        yield prefix, config
        return
    for key, value in config.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
