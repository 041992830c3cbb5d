from __future__ import annotations

from tests.hostile.table import pytest_terminal_summary
from tests.trained import trained

__all__ = ["pytest_terminal_summary", "trained"]
