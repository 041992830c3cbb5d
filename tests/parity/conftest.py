"""dalle-pytorch for comparison: installed without its dependencies, two of which are stubbed."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

REFERENCE = ("dalle_pytorch", "einops", "axial_positional_embedding", "rotary_embedding_torch")


def stub(name: str, **attributes: object) -> None:
    """Put an empty module where an import of it that is never used will find it."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules.setdefault(name, module)


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The module `dalle_pytorch.dalle_pytorch`; skips where the reference is not installed."""
    missing = [name for name in REFERENCE if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"parity needs {', '.join(missing)}; `make test` installs the reference")
    for name in ("taming", "taming.models"):
        stub(name, __path__=[])
    stub("taming.models.vqgan", VQModel=object, GumbelVQ=object)
    if importlib.util.find_spec("pkg_resources") is None:
        stub("pkg_resources", get_distribution=lambda name: None)
    import dalle_pytorch.dalle_pytorch

    return dalle_pytorch.dalle_pytorch
