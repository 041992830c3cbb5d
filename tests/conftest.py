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
    """Messages are not wrapped: tests in several processes are given the width of the terminal."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def closed_console() -> Iterator[None]:
    """A command that ran in the process of the tests leaves no console behind it.

    With one, messages would not reach `caplog`, or would reach it twice.
    """
    yield
    LOGGER.handlers.clear()
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True
