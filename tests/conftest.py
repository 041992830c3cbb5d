from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.finished_runs import trained
from tests.hostile.table import pytest_terminal_summary
from vilmedic.log import LOGGER

__all__ = ["pytest_terminal_summary", "trained"]


@pytest.fixture(autouse=True)
def closed_console() -> Iterator[None]:
    """A command that ran in the process of the tests leaves no console behind it.

    With one, messages would not reach `caplog`, or would reach it twice.
    """
    yield
    LOGGER.handlers.clear()
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True
