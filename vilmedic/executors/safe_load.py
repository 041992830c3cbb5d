"""Checkpoint files of this and of older projects, read without running anything that is in them.

Files of the original vilmedic and of dalle-pytorch hold a pickled OmegaConf configuration and
NumPy numbers beside the tensors, those of PyTorch Lightning the names of callbacks.
`torch.load(weights_only=True)` builds nothing but tensors, plain values and what is allowed by
name: here these few data classes, none of which does anything when it is built. They are plain
values before anyone sees them.
"""

from __future__ import annotations

import operator
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata

from vilmedic.errors import CheckpointError

_SCALAR = np.float64(0).__reduce__()[0]
ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    DictConfig,
    ListConfig,
    ContainerMetadata,
    Metadata,
    *(getattr(omegaconf.nodes, f"{kind}Node") for kind in ("Any", "String", "Integer", "Float")),
    omegaconf.nodes.BooleanNode,
    defaultdict,
    *((kind, f"builtins.{kind.__name__}") for kind in (dict, list, tuple, int, float, str, bool)),
    (int, "__builtin__.long"),
    (Any, "typing.Any"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    # Lightning before version 1.5 files the state of callbacks under their classes
    *(
        (type(name.rpartition(".")[2], (), {}), f"pytorch_lightning.callbacks.{name}")
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
        )
    ),
    # the direction of the score that a schedule of the original vilmedic follows
    *((getattr(operator, name), f"_operator.{name}") for name in ("lt", "gt")),
]
"""What a file may hold besides tensors and plain values, with the name it has in old files."""

_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>")
"""How torch names what it refuses."""


def load_plain(path: Path, *, mapped: bool = False) -> Any:
    """The contents of a checkpoint file on the CPU: tensors and plain values.

    Args:
        path: a file of `torch.save`.
        mapped: leave the numbers of tensors on the disk until they are looked at, for a reader who
            only wants what stands beside them. Files of torch before 1.6 are read as a whole.

    Raises:
        CheckpointError: the file is missing or cut short, or holds something that is not allowed,
            whose type is named.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            mmap = mapped and zipfile.is_zipfile(path)
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint.") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, not a checkpoint.") from None
    except Exception as error:
        # torch raises anything from RuntimeError to UnpicklingError for a damaged file.
        message = str(error).strip()
        if found := _FORBIDDEN.search(message):
            raise CheckpointError(
                f"{path}: holds a '{found[1] or found[2]}', which is neither a tensor nor a plain "
                "value. Nothing of such a file is read: it could run any program."
            ) from error
        first = re.split(r"\.\s|\n", f"{type(error).__name__}: {message}".strip(": "))[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint; it was cut short or is something else ({first})."
        ) from error
    return _plain(contents)


def _plain(value: Any) -> Any:
    """A value with configurations as dicts and lists, and NumPy numbers as those of Python."""
    if isinstance(value, DictConfig | ListConfig):
        if _calls(OmegaConf.to_container(value._get_root(), resolve=False)):
            return OmegaConf.to_container(value, resolve=False)
        try:
            return OmegaConf.to_container(value, resolve=True)
        except Exception:  # an interpolation of something that is not in the file
            return OmegaConf.to_container(value, resolve=False)
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict or isinstance(value, defaultdict):
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner) for inner in value)
    return value


def _calls(value: Any) -> bool:
    """Whether an interpolation calls a function, `${oc.env:HOME}`, which could tell anything."""
    if isinstance(value, dict):
        return any(map(_calls, value.values()))
    if isinstance(value, list):
        return any(map(_calls, value))
    return isinstance(value, str) and "${" in value and ":" in value
