from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from vilmedic.errors import DataError
from vilmedic.preparation.download.http import Job, NoSpace, WrongPassword
from vilmedic.preparation.download.progress import TransferBar, check_space, readable, run_all


def test_the_bar_shows_bytes_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = TransferBar("images", 3_000_000, guess=1_000_000)
    job = Job("http://x/a", Path("a"))
    progress.sized(job, 3_000_000)
    assert progress.bar.total == 5_000_000
    progress.sized(job, 3_000_000)
    assert progress.bar.total == 5_000_000  # set again after a restart
    progress.bar.mininterval = 0
    time.sleep(0.05)
    progress.arrived(2_500_000)
    progress.close()
    shown = capsys.readouterr().err
    assert "2.50M/5.00M" in shown
    assert "B/s" in shown
    assert "<00:00" in shown  # the time left


def test_parallel_jobs_fail_independently() -> None:
    seen: list[int] = []

    def work(number: int) -> None:
        seen.append(number)
        if number % 10 == 3:
            raise DataError(f"no {number}")

    failed = run_all(work, iter(range(100)), 4, threading.Event())
    assert sorted(seen) == list(range(100))
    assert failed == {str(n): f"no {n}" for n in range(3, 100, 10)}


def test_a_common_failure_stops_all_jobs() -> None:
    seen: list[int] = []

    def work(number: int) -> None:
        seen.append(number)
        if number == 5:
            raise WrongPassword("no")
        time.sleep(0.001)

    stop = threading.Event()
    with pytest.raises(WrongPassword):
        run_all(work, iter(range(10_000)), 4, stop)
    assert stop.is_set()
    assert len(seen) < 200


def test_space_is_summed_per_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space({tmp_path / "not" / "there": 10})
    with pytest.raises(NoSpace, match=r"has .* free, and 2000\.0 TB will be written"):
        check_space({tmp_path / "a": 10**15, tmp_path / "b": 10**15})


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1500, "1.5 kB"), (570e9, "570.0 GB"), (2e12, "2.0 TB")]
)
def test_human_readable_sizes(size: float, text: str) -> None:
    assert readable(size) == text
