"""Tolerant reading of run-directory files: damaged ones are listed instead of failing the page."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vilmedic.errors import ConfigError, VilmedicError
from vilmedic.files import open_regular

logger = logging.getLogger(__name__)

RUN_FILES = ("config_*.yml", "metrics.jsonl", "results_*.json")
"""Files of a run that a page can show."""
MOST_BYTES = 100_000_000  # of a file that becomes part of a page
MOST_LISTED = 50  # files that are named one by one


class LeftOut:
    """Parts that a page leaves out, each with the reason.

    Args:
        run_dir: the directory of the run.
        report: gets the message at once, to print it for example; the log by default.
        what: the page, for the message.

    Attributes:
        reasons: path in the run directory and reason, in the order found.
    """

    def __init__(
        self,
        run_dir: Path,
        report: Callable[[str], object] | None = None,
        what: str = "the report",
    ) -> None:
        self.reasons: list[tuple[str, str]] = []
        self._run_dir = run_dir
        self._report, self._what = report or logger.warning, what

    def add(self, path: Path, reason: str) -> None:
        """Note that a file is left out; repeated notes are reported once."""
        inside = path.is_relative_to(self._run_dir)
        name = (path.relative_to(self._run_dir) if inside else path).as_posix()
        if (name, reason) in self.reasons:
            return
        self.reasons.append((name, reason))
        if len(self.reasons) <= MOST_LISTED:
            self._report(f"{path} is left out of {self._what}: {reason}")

    @contextmanager
    def damaged(self, path: Path) -> Iterator[None]:
        """Context that leaves a file out if its contents raise an error.

        The file may come from anywhere: every error means that it was not written by a run.
        """
        try:
            yield
        except Exception as error:
            self.add(path, _reason(error))


def is_run(run_dir: Path) -> bool:
    """Return whether a directory holds any file of a run, damaged or not."""
    return any(next(run_dir.glob(pattern), None) is not None for pattern in RUN_FILES)


def check_run(run_dir: Path) -> None:
    """Refuse a directory that is not a run directory.

    Raises:
        ConfigError: it is not a run directory.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: there is no such run directory.")
    if not is_run(run_dir):
        raise ConfigError(
            f"{run_dir}: not the directory of a run: it has no config_<seed>.yml, metrics.jsonl or "
            "results_<split>.json. Give a folder that bin/train.py wrote, such as ckpt/<name>."
        )


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: it is larger than a page can take.
    """
    with open_regular(path) as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    return content


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: it is too large, or not JSON.
        RecursionError: it nests too deeply.
    """
    return json.loads(read_bytes(path))


def read_entries(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Yield the lines of a metrics file, each with its parsed content; None if it is invalid.

    Args:
        path: the file; there may be none.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    if not path.exists():
        return []
    found = []
    with open_regular(path) as stream:
        lines = stream.readlines()
    for line in lines:
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # not JSON or not UTF-8; lists without end
            entry = None
        whole = isinstance(entry, dict) and all(
            type(entry.get(key)) is int and 0 <= entry[key] < 2**63 for key in ("seed", "step")
        )
        found.append((line, entry if whole else None))
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, VilmedicError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error})"
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, TypeError | AttributeError):
        return f"it is not what a run writes ({error})"
    return str(error) or type(error).__name__
