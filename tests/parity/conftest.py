from __future__ import annotations

from types import ModuleType

import pytest

from tests.parity.reference import load_reference, missing_packages


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The module `dalle_pytorch.dalle_pytorch`; skips where the reference is not installed."""
    if missing := missing_packages():
        pytest.skip(f"parity needs {', '.join(missing)}; `make test` installs the reference")
    return load_reference()
