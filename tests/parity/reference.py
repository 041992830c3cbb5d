"""Load dalle-pytorch for comparison; it is installed without its dependencies, some are stubbed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType

PACKAGES = ("dalle_pytorch", "einops", "axial_positional_embedding", "rotary_embedding_torch")


def missing_packages() -> list[str]:
    """Names of required packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@cache
def load_reference() -> ModuleType:
    """The module `dalle_pytorch.dalle_pytorch`, with its classes `DiscreteVAE` and `DALLE`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if missing := missing_packages():
        raise ModuleNotFoundError(f"{', '.join(missing)}: run `make reference`, which installs it.")
    for name in ("taming", "taming.models"):
        _stub(name, __path__=[])
    _stub("taming.models.vqgan", VQModel=object, GumbelVQ=object)
    without = importlib.util.find_spec("pkg_resources") is None
    if without:
        _stub("pkg_resources", get_distribution=lambda name: None)
    if importlib.util.find_spec("requests") is None:  # for downloads of other VAEs
        _stub("requests")
    reference = importlib.import_module("dalle_pytorch.dalle_pytorch")
    if without:
        del sys.modules["pkg_resources"]  # other packages check for it and then use it
    return reference


def _stub(name: str, **attributes: object) -> None:
    """Register a stub module for an import that is never used."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules.setdefault(name, module)
