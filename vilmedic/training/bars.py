"""How far a run is: bars on a terminal, lines where there is none."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from vilmedic.distributed.launch import is_main_process
from vilmedic.log import LOGGER


class RunBars:
    """Shows the epochs of a run and the steps of each epoch.

    On a terminal these are two bars. In a file, under Slurm say, it is a line after `every`
    seconds within an epoch, so that a long epoch is seen to move and a short one adds nothing.
    Processes other than the main one show nothing.

    Args:
        epochs: number of epochs of the run.
        every: seconds between two lines where there is no terminal.
        terminal: whether bars can be drawn; None asks the standard error stream.
    """

    def __init__(self, epochs: int, *, every: float = 30.0, terminal: bool | None = None) -> None:
        self._main = is_main_process()
        self._terminal = self._main and (sys.stderr.isatty() if terminal is None else terminal)
        self._every = every
        self._epochs = epochs
        self._outer: tqdm[Any] | None = None
        self._inner: tqdm[Any] | None = None

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """Begin an epoch.

        Args:
            epoch: counted from 0.
            steps: its number of steps.
            done: steps of it that were done before.
        """
        self._title = f"Epoch {epoch} of {self._epochs}"
        self._steps, self._done, self._here = steps, done, 0
        self._began = self._told = time.monotonic()
        if not self._terminal:
            return
        if self._outer is None:
            self._outer = tqdm(total=self._epochs, initial=epoch, desc="Epochs", unit="epoch")
        self._inner = tqdm(
            total=steps, initial=done, desc=self._title, unit="step", leave=False, position=1
        )

    def step(self) -> None:
        """Count a step."""
        self._here += 1
        if self._inner is not None:
            self._inner.update()

    def show(self, **numbers: str) -> None:
        """The newest numbers, beside the bar or, when it is time, in a line."""
        if self._inner is not None:
            self._inner.set_postfix(numbers)
        now = time.monotonic()
        if self._terminal or not self._main or now - self._told < self._every:
            return
        self._told = now
        step = self._done + self._here
        left = (now - self._began) / max(self._here, 1) * (self._steps - step)
        text = "".join(f"  {name} {value}" for name, value in numbers.items())
        LOGGER.info(
            "%s  step %d of %d%s  %s left", self._title, step, self._steps, text, clock(left)
        )

    def end_epoch(self) -> None:
        """End an epoch."""
        if self._inner is not None:
            self._inner.close()
            self._inner = None
        if self._outer is not None:
            self._outer.update()

    def close(self) -> None:
        """Take the bars down."""
        for bar in (self._inner, self._outer):
            if bar is not None:
                bar.close()
        self._inner = self._outer = None


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
