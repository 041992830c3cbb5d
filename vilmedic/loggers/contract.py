"""Base class of loggers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
    """A place that numbers go to, besides metrics.jsonl and timing.jsonl.

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
    def picture(self, step: int, path: Path) -> None:
        """Show a PNG file that was made at an optimizer step, under its stem."""

    @abstractmethod
    def close(self) -> None:
        """Flush what is buffered."""


def remembered(run: Run, logger: str) -> Path:
    """The file in which a logger keeps the identity of a run, to continue it after a resume."""
    return run.run_dir / f"{logger}_{run.seed}.id"


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their dotted keys; a list is one value."""
    if not isinstance(config, dict):
        yield prefix, config
        return
    for key, value in config.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
