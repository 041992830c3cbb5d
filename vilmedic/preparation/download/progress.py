"""Parallel transfers with one progress bar, and the check of free disk space."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from vilmedic.errors import DataError
from vilmedic.preparation.download.http import FATAL, Job, NoSpace, Stopped

T = TypeVar("T")
SPARE = 2**29  # bytes left over for what runs beside


class TransferBar:
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
        raise next((e for e in fatal if not isinstance(e, Stopped)), fatal[0])
    return failed


def check_space(needed: Mapping[Path, int]) -> None:
    """Compare what will be written with what is free, disk by disk.

    Args:
        needed: bytes that will be written into each folder; folders of one disk add up.

    Raises:
        NoSpace: a disk has too little.
        DataError: a file is where a folder should be.
    """
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in needed.items():
        place = _existing(folder)
        if not place.is_dir():
            raise DataError(f"{place} is a file; {folder} cannot be written there.")
        disk = place.stat().st_dev
        by_disk[disk] = (place, by_disk.get(disk, (place, 0))[1] + size)
    for place, size in by_disk.values():
        free = shutil.disk_usage(place).free
        if size and size + SPARE > free:
            raise NoSpace(
                f"{place} has {readable(free)} free, and {readable(size)} will be written there "
                f"(with {readable(SPARE)} to spare). Free space, choose another disk with --data, "
                "or fetch less with --subset."
            )


def readable(size: float) -> str:
    """A number of bytes as people say it: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _name(job: Any) -> str:
    return str(getattr(job, "name", None) or getattr(job, "url", job))


def _existing(folder: Path) -> Path:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place
