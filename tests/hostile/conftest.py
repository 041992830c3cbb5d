from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.hostile.table import PROPERTY, Table


@pytest.fixture
def table(record_property: Callable[[str, object], None]) -> Iterator[Table]:
    """Counts the outcomes of hostile inputs; the test fails at its end if one did harm."""
    found = Table()
    yield found
    record_property(PROPERTY, {kind: dict(row) for kind, row in found.counts.items()})
    found.check()
