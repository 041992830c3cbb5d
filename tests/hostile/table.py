"""Count the outcomes of hostile inputs by kind, and print one table at the end of the tests.

A test uses the fixture `table` and passes every input to `table.attempt`, which runs and times it
and counts the outcome. The counts are sent with the test reports, so that the table is complete
with any number of test processes.
"""

from __future__ import annotations

import itertools
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from vilmedic.errors import VilmedicError

COLUMNS = (
    "tried",
    "refused with a message",
    "tracebacks",
    "hangs",
    "written outside",
    "executed",
)
HARM = COLUMNS[2:]
PROPERTY = "hostile"
WAIT = 10  # wall seconds for each allowed CPU second: other tests run at the same time


class Hang(BaseException):
    """Raised on a time limit; not an `Exception`, so that no decoder catches it."""


@dataclass
class Table:
    """Counts of the outcomes of hostile inputs.

    Attributes:
        counts: by kind and column.
        complaints: the errors found, for the message of the test.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def attempt(
        self,
        kind: str,
        name: str,
        act: Callable[[], object],
        *,
        seconds: float = 2.0,
        outside: Sequence[Path] = (),
        marker: Path | None = None,
    ) -> str | None:
        """Run one input.

        Args:
            kind: the row of the table: "configurations", "images".
            name: name of the input, for the message of a failing test.
            act: processes the input; a returned text is the message of a refusal, anything else
                means that the input was accepted. An error of this project counts as a refusal,
                any other as a traceback.
            seconds: limit of CPU time.
            outside: folders in which nothing may change.
            marker: a file that appears if code in the input is executed.

        Returns:
            The message; None without one.
        """
        row = self.counts.setdefault(kind, Counter(dict.fromkeys(COLUMNS, 0)))
        row["tried"] += 1
        before = [_listing(folder) for folder in outside]
        message: str | None = None
        try:
            with _limit(seconds):
                outcome = act()
            message = outcome if isinstance(outcome, str) else None
        except VilmedicError as error:
            message = str(error)
        except Hang:
            self._complain(row, "hangs", name, traceback.format_exc())
        except (Exception, SystemExit):
            self._complain(row, "tracebacks", name, traceback.format_exc())
        if message is not None:
            row["refused with a message"] += 1
            if not message.strip():
                self._complain(row, "tracebacks", name, "refused without a message")
            elif "Traceback (most recent call last)" in message:
                self._complain(row, "tracebacks", name, message)
        if before != [_listing(folder) for folder in outside]:
            self._complain(row, "written outside", name, "")
        if marker is not None and marker.exists():
            marker.unlink()
            self._complain(row, "executed", name, "")
        return message

    def _complain(self, row: Counter[str], column: str, name: str, text: str) -> None:
        row[column] += 1
        self.complaints.append(f"{column}: {name}\n{text}")

    def check(self) -> None:
        """Fail if an input did any harm."""
        assert not self.complaints, "\n\n".join(self.complaints[:5])


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    kept = [signal.signal(one, stop) for one in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in zip((signal.SIGPROF, signal.SIGALRM), kept, strict=True):
            signal.signal(one, handler)


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return [(str(path), state.st_size, state.st_mtime_ns) for path, state in found]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table of all tests and processes."""
    rows: dict[str, Counter[str]] = {}
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", None) != "teardown":
            continue
        for name, counts in report.user_properties:
            for kind, row in counts.items() if name == PROPERTY else ():
                rows.setdefault(kind, Counter()).update(row)
    if not rows:
        return
    terminalreporter.section("hostile inputs")
    width = max(map(len, rows))
    terminalreporter.line("  ".join([" " * width, *COLUMNS]))
    for kind in sorted(rows):
        cells = [str(rows[kind][column]).rjust(len(column)) for column in COLUMNS]
        terminalreporter.line("  ".join([kind.ljust(width), *cells]))
