"""One bar for all transfers, and many transfers at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from tqdm import tqdm

from vilmedic.errors import DataError
from vilmedic.preparation.download.answers import Job
from vilmedic.preparation.download.errors import FATAL, Interrupted

T = TypeVar("T")


class Progress:
    """Bytes that arrived, of those expected, with the time that is left.

    Sizes that are not known yet count as `guess`; they are corrected when the server says them.

    Args:
        what: name of the bar.
        total: bytes expected.
        guess: bytes of a file whose size is not known.
    """

    def __init__(self, what: str, total: int, guess: int = 0) -> None:
        self.guess = guess
        self._lock = threading.Lock()
        self._sizes: dict[Any, int] = {}
        self.bar = tqdm(
            desc=what,
            total=total,
            unit="B",
            unit_scale=True,
            miniters=1,
            # A log file gets a line now and then; a terminal sees it move.
            mininterval=0.5 if sys.stderr.isatty() else 60.0,
        )

    def arrived(self, size: int) -> None:
        """Some bytes came, or (below 0) were thrown away."""
        with self._lock:
            self.bar.update(size)

    def sized(self, job: Job, size: int) -> None:
        """The size of a file is known now."""
        with self._lock:
            before = self._sizes.get(job.path, job.bytes or self.guess)
            self._sizes[job.path] = size
            self.bar.total = (self.bar.total or 0) + size - before

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        self.bar.close()


def run_all(
    work: Callable[[T], object], jobs: Iterable[T], parallel: int, stop: threading.Event
) -> dict[str, str]:
    """Work on many files, so many at a time.

    Args:
        work: what to do with one of them.
        jobs: the files; taken as they are needed, so there may be very many.
        parallel: how many at a time.
        stop: set when one failed for a reason that all others would fail for as well.

    Returns:
        Of each file that failed for a reason of its own, that reason.

    Raises:
        DataError: the reason that stopped everything.
    """
    failed: dict[str, str] = {}
    fatal: list[BaseException] = []
    pending: dict[Future[object], T] = {}

    def settle(done: Iterable[Future[object]]) -> None:
        for future in done:
            job = pending.pop(future)
            error = future.exception()
            if isinstance(error, DataError) and not isinstance(error, FATAL):
                failed[_name(job)] = str(error)
            elif error is not None:
                fatal.append(error)
                stop.set()

    with ThreadPoolExecutor(parallel, thread_name_prefix="fetch") as pool:
        try:
            for job in jobs:
                pending[pool.submit(work, job)] = job
                if len(pending) >= 4 * parallel:
                    settle(wait(pending, return_when=FIRST_COMPLETED).done)
                if fatal:
                    break
            settle(wait(pending).done)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    if fatal:
        raise next((e for e in fatal if not isinstance(e, Interrupted)), fatal[0])
    return failed


def _name(job: Any) -> str:
    return str(getattr(job, "name", None) or getattr(job, "url", job))
