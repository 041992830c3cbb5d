"""What Ctrl-C and SIGTERM do to a run: it ends after the step, with its state saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from vilmedic.distributed.launch import process_count
from vilmedic.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Catches signals while it is entered, once; the second one acts as it always does.

    A launcher of several processes passes signals on, and repeats them: those of its processes are
    caught as often as they come, and the launcher itself ends what takes too long.

    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    @contextmanager
    def may_come_at_once(self) -> Iterator[None]:
        """A stretch that changes nothing, an evaluation say, and may be left in the middle.

        With several processes it is not left, since the others would wait.

        Raises:
            Interrupted: a signal came.
        """
        if process_count() > 1:
            yield
            return
        self._at_once = True
        try:
            if self.received is not None:
                raise self.stop("")
            yield
        finally:
            self._at_once = False

    def stop(self, message: str) -> Interrupted:
        """The error that ends the run, with the status that shells give a process so ended."""
        # Where another process was told to stop, this one may hear of it from that.
        return Interrupted(message, 128 + (self.received or signal.SIGTERM))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if process_count() == 1:
            self._let_go()
        if self._at_once:
            raise self.stop("")

    def _let_go(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
