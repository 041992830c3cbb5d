"""What processes that write nothing have in the place of a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class NoLog:
    """Takes the numbers of a run and forgets them."""

    lines = 0

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Take a line."""

    def timing(self, step: int, values: dict[str, Any]) -> None:
        """Take a line."""

    def pictures(self, step: int, folder: Path) -> None:
        """Take pictures."""

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""
