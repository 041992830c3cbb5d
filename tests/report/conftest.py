from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.browser import Page, start_browser
from tests.report.runs import write_run
from vilmedic.report.page import write_report


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium; without one its tests are skipped, but not in CI."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        reason = f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver"
        if os.environ.get("VILMEDIC_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small run with everything in it."""
    return write_report(write_run(tmp_path_factory.mktemp("ckpt") / "demo"))


@pytest.fixture
def page(browser: Any, report: Path) -> Page:
    """The report, open on a desktop."""
    return Page(browser, report)
