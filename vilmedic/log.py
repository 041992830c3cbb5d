"""Console logging."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from vilmedic.distributed.launch import is_main_process
from vilmedic.errors import escaped

LOGGER = logging.getLogger("vilmedic")


class _Console(logging.StreamHandler):
    """Writes lines above progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _Line(logging.Formatter):
    """A message after its time; labels and reports in it cannot control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def start_console() -> None:
    """Send the project's messages to standard output, one line each, from the main process."""
    if LOGGER.handlers:
        return
    handler = _Console(sys.stdout)
    handler.setFormatter(_Line("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    LOGGER.propagate = False
