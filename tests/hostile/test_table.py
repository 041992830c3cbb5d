"""The table of hostile inputs detects all kinds of harm."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hostile.table import COLUMNS, Table
from vilmedic.errors import DataError


def refuse() -> str | None:
    raise DataError("no image")


def fail() -> str | None:
    raise KeyError("x")


def compute() -> str | None:
    while True:
        pass


def test_the_table_counts_every_outcome(tmp_path: Path) -> None:
    table = Table()
    marker = tmp_path / "marker"
    table.attempt("a", "taken", lambda: None)
    assert table.attempt("a", "refused", refuse) == "no image"
    assert table.attempt("a", "told", lambda: "error: no") == "error: no"
    table.check()
    table.attempt("b", "defect", fail)
    table.attempt("b", "exit", lambda: exec("raise SystemExit(3)"))
    table.attempt("b", "silent", lambda: " ")
    table.attempt("b", "waits", lambda: time.sleep(60), seconds=0.01)
    table.attempt("b", "computes", compute, seconds=0.05)
    table.attempt("b", "writes", lambda: (tmp_path / "x").touch(), outside=[tmp_path])
    table.attempt("b", "runs", marker.touch, marker=marker)
    assert list(table.counts["a"].values()) == [3, 2, 0, 0, 0, 0]
    assert dict(table.counts["b"]) == dict(zip(COLUMNS, (7, 1, 3, 2, 1, 1), strict=True))
    with pytest.raises(AssertionError, match="KeyError: 'x'"):
        table.check()
