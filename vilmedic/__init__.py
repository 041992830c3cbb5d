"""Self-supervised learning on chest X-rays and their reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vilmedic.errors import VilmedicError as VilmedicError
    from vilmedic.inputs import images_in as images_in
    from vilmedic.run import evaluate as evaluate
    from vilmedic.run import load as load
    from vilmedic.run import train as train
    from vilmedic.trained_model import TrainedModel as TrainedModel

_MODULES = {
    "load": "run",
    "train": "run",
    "evaluate": "run",
    "TrainedModel": "trained_model",
    "images_in": "inputs",
    "VilmedicError": "errors",
}
__all__ = ["TrainedModel", "VilmedicError", "evaluate", "images_in", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: the commands start without torch, and so does `import vilmedic`."""
    if name not in _MODULES:
        raise AttributeError(f"module 'vilmedic' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"vilmedic.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
