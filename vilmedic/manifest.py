"""Manifest of an exported folder: its files and their checksums.

`vilmedic.json` in the folder lists its files with their sizes and SHA-256 digests, and says which
of them hold which weights of the model. README.md is not among them: it is there to be edited.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vilmedic.errors import CheckpointError, visible
from vilmedic.files import confined, open_regular

MANIFEST = "vilmedic.json"
FORMAT = 1
"""Format version of the folder; readers refuse unknown ones."""
IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER = "image_encoder", "text_encoder", "tokenizer"
VAE_FOLDER, DALLE_FOLDER, ONNX_FOLDER = "vae", "dalle", "onnx"
FOLDERS = (IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER, VAE_FOLDER, DALLE_FOLDER, ONNX_FOLDER)
WEIGHTS = "model.safetensors"
KINDS = (".safetensors", ".json", ".txt", ".onnx", ".data")
"""Suffixes of exported files: weights, plain values and words, but no code."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
MOST_BYTES = 100_000_000  # of a manifest
MOST_FILES = 1000
CHUNK = 2**20


def is_repository(name: str) -> bool:
    """Return whether a name may be that of a repository, `user/name`, rather than a path."""
    return REPOSITORY.fullmatch(name) is not None and not os.path.isdir(name.partition("/")[0])


def is_export(path: str | Path) -> bool:
    """Return whether a path leads to an exported folder."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, with checked file names.

    Raises:
        CheckpointError: it cannot be read, is damaged, of another format, or names a file that
            is outside the folder or of a kind that no export has.
    """
    path = folder / MANIFEST
    try:
        with open_regular(path) as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError("it is too large")
        manifest = json.loads(content)
        if not isinstance(manifest, dict):
            raise ValueError("it holds no mapping")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}.") from None
    if manifest.get("format") != FORMAT:
        given = visible(str(manifest.get("format")))
        raise CheckpointError(
            f"{path}: is of format {given}, allowed: {FORMAT}. A newer version of vilmedic may "
            "have written it."
        )
    try:
        _check_names(folder, manifest.get("files"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged: {error}.") from None
    return manifest


def read_by_us(manifest: Mapping[str, Any]) -> list[str]:
    """The files of an export that make a model of this project: all but those for ONNX."""
    return [name for name in manifest["files"] if _part(name) != ONNX_FOLDER]


def check_files(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Verify files of an exported folder by their digests.

    Args:
        folder: the folder.
        manifest: the result of `read_manifest`.
        names: files that it lists.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    for name in names:
        path, said = folder / name, manifest["files"][name]
        try:
            size, digest = _measured(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror or error}. The folder is not complete: "
                "copy or download it again."
            ) from error
        if (size, digest) != (said["size"], said["sha256"]):
            same = f"its content is not what {MANIFEST} lists"
            other = f"it has {size:,} bytes, {MANIFEST} lists {said['size']:,}"
            raise CheckpointError(
                f"{path}: is damaged or was changed: {same if size == said['size'] else other}. "
                "Copy or download the folder again."
            )


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest entries of the files in a folder, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in KINDS and path != folder / MANIFEST:
            size, digest = _measured(path)
            found[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    return found


def exported_part(name: str, *wanted: str) -> str:
    """Return the folder of one part of an export.

    Args:
        name: an exported folder, a part of one, or any other name, which is returned unchanged.
        wanted: names of the part, such as `text_encoder`; the first existing one is taken.

    Returns:
        The folder of the part, verified; or the name.

    Raises:
        CheckpointError: the export is damaged or has no such part.
    """
    folder = Path(name)
    if not is_export(folder):
        if not (folder.name and is_export(folder.parent)):
            return name
        wanted, folder = (folder.name,), folder.parent
    manifest = read_manifest(folder)
    there = {_part(file) for file in manifest["files"]}
    part = next((one for one in wanted if one in there), None)
    if part is None:
        system = visible(str(manifest.get("system")))
        raise CheckpointError(f"{folder}: has no {wanted[0]}: it is an export of {system}.")
    check_files(folder, manifest, [file for file in manifest["files"] if _part(file) == part])
    return str(folder / part)


def _part(name: str) -> str:
    """The part of an export that a file of it belongs to: its folder, or its own name."""
    return PurePosixPath(name).parts[0]


def _check_names(folder: Path, files: Any) -> None:
    """Refuse an invalid list of files.

    Raises:
        ValueError: explains why it is invalid.
    """
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    if len(files) > MOST_FILES:
        raise ValueError(f"it lists more than {MOST_FILES} files")
    for name, said in files.items():
        try:
            confined(folder, name)
        except ValueError as error:
            raise ValueError(f"the file '{visible(name)}': {error}") from None
        if PurePosixPath(name).suffix not in KINDS or "\\" in name:
            allowed = ", ".join(KINDS)
            raise ValueError(f"the file '{visible(name)}' is none of an export ({allowed})")
        if not (
            isinstance(said, dict)
            and isinstance(said.get("size"), int)
            and isinstance(said.get("sha256"), str)
            and re.fullmatch("[0-9a-f]{64}", said["sha256"])
        ):
            raise ValueError(f"the file '{visible(name)}' has no digest")


def _measured(path: Path) -> tuple[int, str]:
    """Bytes of a file, and the SHA-256 digest of them."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
