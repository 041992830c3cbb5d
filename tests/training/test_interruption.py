from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from vilmedic.errors import Interrupted
from vilmedic.training.interruption import Interruption


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    """Started in the background, a process ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signal_is_noted_and_the_next_one_acts_as_always() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert interruption.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received == signal.SIGTERM
        assert interruption.stop("saved").status == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_evaluation_is_left_at_once() -> None:
    reached = []

    def evaluate(interruption: Interruption) -> None:
        with interruption.may_come_at_once():
            reached.append("begin")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("end")

    with Interruption() as interruption:
        with pytest.raises(Interrupted):
            evaluate(interruption)
        with pytest.raises(Interrupted):
            evaluate(interruption)
    assert reached == ["begin"]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_are_left_alone() -> None:
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            with Interruption():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed
