"""How far a run is: bars on a terminal, lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from vilmedic.executors.log import LOGGER, is_main_process

T = TypeVar("T")


class RunBars:
    """Shows the epochs of a run and the steps of each epoch.

    On a terminal these are two bars. In a file, under Slurm say, it is a line after `every`
    seconds within an epoch, so that a long epoch is seen to move and a short one adds nothing.
    Processes other than the main one show nothing.

    Args:
        epochs: number of epochs of the run.
        done: epochs already done.
        every: seconds between two lines where there is no terminal.
        terminal: whether bars can be drawn; None asks the standard error stream.
    """

    def __init__(
        self, epochs: int, done: int = 0, *, every: float = 30.0, terminal: bool | None = None
    ) -> None:
        self._main = is_main_process()
        self._bars = self._main and (sys.stderr.isatty() if terminal is None else terminal)
        self._every = every
        self._epochs = epochs
        self._outer = tqdm(
            total=epochs, initial=done, desc="Epochs", unit="epoch", disable=not self._bars
        )
        self._inner: tqdm[object] | None = None
        self._numbers: dict[str, str] = {}

    def steps(self, steps: Iterable[T], *, epoch: int, total: int, done: int = 0) -> Iterator[T]:
        """Pass on the steps of an epoch and show how many are done.

        Args:
            steps: what is passed on.
            epoch: the epoch, counted from 0.
            total: number of steps of the whole epoch.
            done: steps of it done before.
        """
        title = f"Epoch {epoch} of {self._epochs}"
        if self._bars:
            self._inner = tqdm(
                steps, total=total, initial=done, desc=title, unit="step", leave=False
            )
            yield from self._inner
        else:
            yield from self._with_lines(steps, title, total, done)
        self._outer.update()

    def show(self, **numbers: str) -> None:
        """The newest numbers, beside the bar or in the next line."""
        self._numbers = numbers
        if self._inner is not None:
            self._inner.set_postfix(numbers)

    def close(self) -> None:
        """Take the bars down."""
        if self._inner is not None:
            self._inner.close()
        self._outer.close()

    def _with_lines(self, steps: Iterable[T], title: str, total: int, done: int) -> Iterator[T]:
        started = shown = time.monotonic()
        for count, step in enumerate(steps, start=1):
            yield step
            now = time.monotonic()
            if self._main and now - shown >= self._every:
                shown = now
                left = (now - started) / count * (total - done - count)
                numbers = "".join(f"  {key} {value}" for key, value in self._numbers.items())
                LOGGER.info(
                    "%s  step %d of %d%s  %s left", title, done + count, total, numbers, clock(left)
                )


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
