"""Exported folders and safetensors files read as checkpoints; no code in them is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from vilmedic.errors import CheckpointError
from vilmedic.files import no_file, open_regular
from vilmedic.manifest import MANIFEST, check_files, read_by_us, read_manifest

SAID = ("epoch", "seed", "metric", "better", "score")
"""Fields about a checkpoint that an export passes on."""


def is_safetensors(path: Path) -> bool:
    """Return whether a file starts like a safetensors file: a length, then JSON."""
    try:
        with open_regular(path) as stream:
            start = stream.read(9)
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    except OSError:
        return False


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: it is missing, cut short or damaged.
    """
    if (kind := no_file(path)) is not None:
        raise CheckpointError(f"{path}: is {kind}, not a file of weights.")
    try:
        return dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file of weights.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # SafetensorError, but also what torch makes of damaged values
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{path}: not a readable safetensors file; it was cut short or is damaged ({reason})."
        ) from error


def read_export(folder: Path) -> dict[str, Any]:
    """An exported folder in the shape of a checkpoint.

    Its files are first verified by their digests.

    Returns:
        `model`, `config`, `data`, `networks`, `vae`, `progress`, the fields about the
        checkpoint, and as `export` everything else in the manifest.

    Raises:
        CheckpointError: a file is missing, damaged or changed.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, read_by_us(manifest))
    try:
        weights = _weights(folder, manifest["weights"], manifest["files"])
        data = _with_tokenizer(folder, manifest["data"], manifest["files"])
        source = dict(manifest["source"])
        step = manifest["step"]
        if not isinstance(step, int | None):
            raise TypeError("its step is no number")
        return {
            "model": weights,
            "config": manifest["config"],
            "data": data,
            "networks": manifest["networks"],
            "vae": manifest.get("vae"),
            "progress": {"step": step},
            "export": {"about": dict(manifest["about"]), "source": source},
            **{name: source.get(name) for name in SAID},
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{folder / MANIFEST}: is damaged: {reason}.") from None


def _weights(folder: Path, places: Any, files: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights under the names that the model has for them.

    Args:
        folder: the export.
        places: for each file, the prefix of its names and the prefix in the model.
        files: the verified files.
    """
    found: dict[str, Tensor] = {}
    for place in places:
        name, theirs, ours = (str(place[key]) for key in ("file", "theirs", "ours"))
        if name not in files:
            raise ValueError(f"it lists no file '{name}'")
        for key, value in load_safetensors(folder / name).items():
            if key.startswith(theirs):
                found[ours + key.removeprefix(theirs)] = value
    if not found:
        raise ValueError("it names no weights")
    return found


def _with_tokenizer(folder: Path, data: Any, files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data properties of the model, with the tokenizer from its separate file."""
    plain = dict(data)
    if (tokenizer := plain.get("tokenizer")) is not None:
        name = tokenizer["file"]
        if name not in files:
            raise ValueError(f"it lists no file '{name}'")
        text = (folder / name).read_text(encoding="utf-8")
        plain["tokenizer"] = {"json": text, "special": dict(tokenizer["special"])}
    return plain
