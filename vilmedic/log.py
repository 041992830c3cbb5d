"""Console logging, and progress of long steps."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from tqdm import tqdm

from vilmedic.distributed.launch import is_main_process
from vilmedic.errors import escaped

LOGGER = logging.getLogger("vilmedic")
FIRST, EVERY = 5.0, 30.0
"""Seconds before the first progress line, and between lines."""
BAR = "{desc}  {n_fmt} of {total_fmt} {unit}  {bar} {remaining} left"
T = TypeVar("T")


class _Console(logging.StreamHandler):
    """Writes lines above progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _Line(logging.Formatter):
    """Formatter of time and message; escapes control characters of labels and reports.

    If the width of the terminal is known, long lines are wrapped: between the numbers of a line of
    numbers, which are separated by two spaces, otherwise between words.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = escaped(super().format(record))
        width = columns()
        if width is None or "\n" in text:
            return text
        return "\n".join(wrapped(text, width))


def columns() -> int | None:
    """Return the columns of the terminal, or of COLUMNS; None for a file."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal():
        return max(40, shutil.get_terminal_size().columns)
    return None


def wrapped(text: str, width: int, indent: int = 10) -> list[str]:
    """Wrap a line to at most `width` columns; unbreakable parts stay longer.

    Args:
        text: the line; its parts are separated by two spaces.
        width: columns.
        indent: spaces in front of all lines but the first, as wide as the time.
    """
    margin = " " * indent
    first, *parts = text.split("  ")
    lines = [first]
    for part in parts:
        joined = f"{lines[-1]}  {part}"
        if len(joined) <= width or lines == [first]:  # the time stands alone in no line
            lines[-1] = joined
        else:
            lines.append(margin + part)
    wrap = textwrap.TextWrapper(width, subsequent_indent=margin)
    wrap.break_long_words = wrap.break_on_hyphens = wrap.replace_whitespace = False
    return [short for line in lines for short in (wrap.wrap(line) if len(line) > width else [line])]


def start_console() -> None:
    """Send the project's messages to standard output, one line each, from the main process."""
    if LOGGER.handlers:
        return
    handler = _Console(sys.stdout)
    handler.setFormatter(_Line("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    LOGGER.propagate = False


class Progress:
    """Progress of a long step, in a `with` statement.

    On a terminal it is a bar if the number of items is known. Otherwise it is a line after 5
    seconds and then every 30, so that quick steps add none. Of nested ones the innermost is shown.
    Only the main process shows it.

    Args:
        title: name of the step.
        total: number of items; None if unknown.
        unit: name of the items.
        terminal: whether a bar can be drawn; None asks the standard error stream.
    """

    _open: ClassVar[list[Progress]] = []

    def __init__(
        self, title: str, total: int | None = None, unit: str = "", *, terminal: bool | None = None
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._main = is_main_process()
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: tqdm[Any] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if not self._main:
            return self
        self._open.append(self)
        if self._terminal and self.total is not None:
            self._bar = tqdm(
                total=self.total,
                desc=self.title,
                unit=self.unit,
                leave=False,
                delay=1,
                dynamic_ncols=True,
                bar_format=BAR,
            )
        else:
            threading.Thread(target=self._log_at_intervals, name="progress", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self in self._open:
            self._open.remove(self)
        if self._bar is not None:
            self._bar.close()

    def update(self, number: int = 1) -> None:
        """Count finished items."""
        self.done += number
        if self._bar is not None:
            self._bar.update(number)

    def line(self) -> str:
        """Return the progress line."""
        seconds = time.monotonic() - self._began
        if self.total is None or not self.done:
            return f"{self.title}  {clock(seconds)} so far"
        left = seconds / self.done * (self.total - self.done)
        return (
            f"{self.title}  {self.done:,} of {self.total:,} {self.unit}".rstrip()
            + f"  {clock(left)} left"
        )

    def _log_at_intervals(self) -> None:
        wait = FIRST
        while not self._ended.wait(wait):
            wait = EVERY
            if self._open and self._open[-1] is self:
                if LOGGER.handlers:
                    LOGGER.info("%s", self.line())
                else:  # a command that prints
                    print(escaped(self.line()), file=sys.stderr, flush=True)


def progress(things: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Yield items and show the progress; see `Progress`.

    Args:
        things: the items; the next one is requested when the last is done.
        title: name of the step.
        unit: name of the items.
        total: number of items; None takes their length.
    """
    if total is None and isinstance(things, Sized):
        total = len(things)
    with Progress(title, total, unit) as shown:
        for thing in things:
            yield thing
            shown.update()


def counted(number: int, what: str, several: str = "") -> str:
    """Return a number with its noun: `1 epoch`, `2 epochs`.

    Args:
        number: how many.
        what: the words after 1.
        several: the words after other numbers; empty for `what` and an s.
    """
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
