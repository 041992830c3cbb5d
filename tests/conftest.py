from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from tests.finished_runs import trained
from tests.hostile.table import pytest_terminal_summary
from vilmedic.log import LOGGER

__all__ = ["pytest_terminal_summary", "trained"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Disable wrapping of messages: pytest-xdist passes the terminal width to its workers."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def closed_console() -> Iterator[None]:
    """Remove the console handlers of commands that ran in the test process.

    Otherwise messages would not reach `caplog`, or would reach it twice.
    """
    yield
    LOGGER.handlers.clear()
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True
