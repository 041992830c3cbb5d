"""Open a report in a headless browser and interact with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 60.0


def start_browser(profile: Path) -> Any:
    """Start Chromium through its driver."""
    import shutil

    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


class Page:
    """A report open in a browser window of a given size."""

    def __init__(self, driver: Any, path: Path, width: int = 1360, height: int = 900) -> None:
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get_log("browser")  # clears the log of the previous page
        driver.get(path.as_uri())
        self.until(lambda: self.run("return document.documentElement.dataset.ready === 'true'"))

    def run(self, script: str) -> Any:
        """Run a script and return its value."""
        return self.driver.execute_script(script)

    def until(self, true: Callable[[], Any]) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.05)

    def errors(self) -> list[str]:
        """The console errors since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def text(self, css: str) -> str:
        """The text of an element."""
        found: str = self.driver.find_element("css selector", css).text
        return found

    def pointed_at(self, number: int) -> None:
        """Move the mouse to a point of the map."""
        from selenium.webdriver.common.action_chains import ActionChains

        self.run("document.getElementById('scatter').scrollIntoView({behavior: 'instant'})")
        points = self.driver.find_elements("css selector", "#scatter .trace .point")
        ActionChains(self.driver).move_to_element(points[number]).perform()

    def search(self, words: str) -> None:
        """Type into the search box and wait for the result."""
        from selenium.webdriver.common.keys import Keys

        box = self.driver.find_element("id", "search")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.BACKSPACE, words)
        self.until(lambda: self.run("return explorer.query.text") == words)
