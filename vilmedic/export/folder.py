"""Export folders: written to a temporary folder, verified, and moved into place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vilmedic.blocks.pretrained import network_configs
from vilmedic.checkpoints.exported import SAID
from vilmedic.errors import CheckpointError, ConfigError, visible
from vilmedic.export.card import CARD, gather, shortened, write_card
from vilmedic.export.onnx import require_packages, write_onnx
from vilmedic.export.parts import Part, write_parts
from vilmedic.files import replace_text
from vilmedic.log import LOGGER
from vilmedic.manifest import (
    FORMAT,
    MANIFEST,
    check_files,
    describe_files,
    is_export,
    read_manifest,
)
from vilmedic.models.from_checkpoint import Loaded

KEPT = ("name", "model", "dataset")
"""Sections of a configuration that define a model."""
OF_SYSTEM = re.compile(r"([^:]+) \(os error \d+\)")
"""Pattern of write errors of safetensors and tokenizers, such as on a full disk."""


def write_export(
    loaded: Loaded, folder: str | Path, *, onnx: bool = False, force: bool = False
) -> bool:
    """Write a model for others; see `TrainedModel.export`.

    Args:
        loaded: the model and its data properties.
        folder: the target. An export of the same weights stays as it is, including its README.md.
        onnx: write ONNX files as well.
        force: replace an export of other weights.

    Returns:
        Whether something was written.

    Raises:
        ConfigError: the folder holds something else, or a package is missing.
        VilmedicError: a part cannot be exported.
    """
    if "\0" in str(folder):
        raise ConfigError(f"{visible(str(folder))}: cannot be the name of a folder.")
    target = Path(os.path.abspath(folder))
    if onnx:
        require_packages()
    device = next(loaded.model.parameters()).device
    loaded.model.to("cpu")
    try:
        identity = {"weights": _digest(loaded), "onnx": onnx}
        if not _to_write(target, identity, force):
            LOGGER.info("%s holds this export already and stays as it is", target)
            return False
        draft = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(draft, ignore_errors=True)  # left by a killed export
        draft.mkdir(parents=True)
        try:
            _write(loaded, draft, identity)
            _move(draft, target)
            LOGGER.info("Written: %s; fill in the licence in %s", target, target / CARD)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        where = error.filename2 or error.filename or target
        raise ConfigError(f"{where}: cannot be written: {error.strerror or error}.") from error
    except Exception as error:
        if (refused := OF_SYSTEM.search(str(error))) is None:
            raise
        raise ConfigError(f"{target}: cannot be written: {refused[1].strip()}.") from error
    finally:
        loaded.model.to(device)
    return True


def _write(loaded: Loaded, draft: Path, identity: Mapping[str, Any]) -> None:
    """Write all files of an export."""
    parts = write_parts(loaded, draft)
    onnx = write_onnx(loaded, draft) if identity["onnx"] else None
    about = gather(loaded)
    write_card(loaded, parts, about, onnx, draft)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "written_by": f"vilmedic {metadata.version('vilmedic')}",
        "system": type(loaded.model).__name__,
        "source": {
            "checkpoint": loaded.path.name,
            "ema": loaded.ema,
            **{name: loaded.header.get(name) for name in SAID},
        },
        "identity": identity,
        "step": loaded.header.get("step"),
        "config": shortened({key: loaded.config[key] for key in KEPT if key in loaded.config}),
        "data": _data(loaded, draft, parts),
        "networks": network_configs(loaded.model),
        "vae": loaded.model.stated_vae(),
        "weights": [dataclasses.asdict(place) for part in parts for place in part.places],
        "onnx": onnx,
        "about": about,
        "files": describe_files(draft),
    }
    for name in manifest["files"]:  # some libraries write files that only their owner may read
        shutil.copymode(draft / CARD, draft / name)
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(draft / MANIFEST, text + "\n")


def _data(loaded: Loaded, draft: Path, parts: list[Part]) -> dict[str, Any]:
    """Return the data properties of the model; the tokenizer is a file of the export."""
    plain = loaded.spec.to_plain()
    if plain["tokenizer"] is not None:
        [file] = [part.name for part in parts if part.name.endswith("tokenizer.json")]
        plain["tokenizer"] = {"file": file, "special": plain["tokenizer"]["special"]}
    return plain


def _digest(loaded: Loaded) -> str:
    """Return the SHA-256 of the weights and their names, the identity of an export."""
    digest = hashlib.sha256()
    for name, value in sorted(loaded.model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_write(target: Path, identity: Mapping[str, Any], force: bool) -> bool:
    """Return whether an export must be written, or already exists.

    Raises:
        ConfigError: something else is there.
    """
    if not os.path.lexists(target):
        return True
    if not target.is_dir():
        raise ConfigError(f"{target}: is a file; an export is a folder. Name another place.")
    if not any(target.iterdir()):
        return True
    if not is_export(target):
        raise ConfigError(
            f"{target}: holds something that is no export. Name a folder that is empty or does not "
            "exist."
        )
    if force:
        return True
    try:
        manifest = read_manifest(target)
        check_files(target, manifest, manifest["files"])
    except CheckpointError as error:
        raise ConfigError(f"{error} Write it again with --force (force=True).") from error
    known = manifest.get("identity")
    if known == identity:
        return False
    if isinstance(known, dict) and known.get("weights") == identity["weights"]:
        what = "without ONNX files" if identity["onnx"] else "with ONNX files"
        raise ConfigError(
            f"{target}: holds an export of these weights {what}. Replace it with --force "
            "(force=True), which also writes README.md again."
        )
    raise ConfigError(
        f"{target}: holds an export of other weights. Replace it with --force (force=True), or "
        "name another folder."
    )


def _move(draft: Path, target: Path) -> None:
    """Move a complete export into place; an existing one is removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():
        os.replace(target, old)
    os.replace(draft, target)
    shutil.rmtree(old, ignore_errors=True)
