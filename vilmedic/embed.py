"""The embed command: image and text embeddings of a run, written to a file."""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vilmedic.checkpoints.checkpoint import read_header
from vilmedic.checkpoints.older_formats import ZOO_CONFIG
from vilmedic.datasets.decode import SUFFIXES
from vilmedic.datasets.lines import listed, shown
from vilmedic.datasets.vocabulary import FOLDER, WORD_LIST
from vilmedic.device import pick_device
from vilmedic.embedding_file import Column, write_embeddings
from vilmedic.errors import ConfigError, DataError
from vilmedic.files import sha256_of
from vilmedic.inputs import images_in
from vilmedic.log import Progress
from vilmedic.manifest import MANIFEST, is_export
from vilmedic.run import find_checkpoint, load
from vilmedic.tables import open_text, read_numbered, table_columns
from vilmedic.trained_model import TrainedModel

KINDS = (".npz", ".parquet")


@dataclass(frozen=True)
class Inputs:
    """Images or texts given on the command line.

    Args:
        texts: paths or texts, one an input; empty where the file has none.
        places: the place of each input, for messages; None for files of a folder.
    """

    texts: list[str]
    places: list[str] | None = None

    def blank(self) -> list[str]:
        """Return the place of a missing input."""
        return [p for text, p in zip(self.texts, self.places or (), strict=False) if not text]


def embed_files(given: argparse.Namespace) -> bool:
    """Run the command.

    Args:
        given: see `vilmedic.cli.embed`.

    Returns:
        Whether anything was done.

    Raises:
        VilmedicError: an argument, an input or the checkpoint cannot be used.
    """
    _check_output(given)
    images = None if given.images is None else read_images(given.images, given.image_column)
    texts = None if given.texts is None else read_texts(given.texts)
    for inputs in (images, texts):
        if inputs is not None and given.on_error == "raise" and (blank := inputs.blank()):
            raise DataError(f"{listed(blank, 'empty input')}.")
    if images is not None and given.on_error == "raise":
        missing = [path for path in images.texts if not os.path.isfile(path)]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(images.texts)} images do not exist: {shown(missing)}. "
                "Relative paths start in the current folder; --on-error skip leaves such rows nan."
            )
    job = _Job(given, find_checkpoint(given.run, given.ckpt))
    columns = []
    if images is not None:
        columns.append(Column("visual", "path", images.texts, job.images(images), job.batch))
    if texts is not None:
        columns.append(Column("linguistic", "text", texts.texts, job.texts(texts), job.batch))
    total = sum(len(column.inputs) for column in columns)
    with Progress("Embedding", total, "inputs") as bar:
        job.bar = bar
        return write_embeddings(
            given.out,
            columns,
            job.plan(images, texts),
            force=given.force,
            allow_errors=given.on_error == "skip",
            on_kept=bar.update,
        )


def read_images(source: Path, column: str | None) -> Inputs:
    """Read the image paths from a folder, a list with one path per line, a CSV column or one image.

    Raises:
        DataError: there is no such file or column, or no path in it.
    """
    if source.is_dir():
        return Inputs(images_in(source))
    if not source.is_file():
        raise DataError(f"--images: there is no folder or file '{source}'.")
    if column is not None:
        rows = list(read_numbered(source, [column]))
        found = Inputs([v for _, (v,) in rows], [f"{source}:{number}" for number, _ in rows])
    elif source.suffix.lower() in SUFFIXES:
        return Inputs([str(source)])
    elif source.name.lower().removesuffix(".gz").endswith(".csv"):
        names = ", ".join(table_columns(source))
        raise DataError(
            f"--images: {source} is a table. Name the column that holds the paths with "
            f"--image-column. Allowed: {names}."
        )
    else:
        found = _lines(source)
        kept = [one for one in zip(found.texts, found.places or (), strict=True) if one[0]]
        found = Inputs([text for text, _ in kept], [place for _, place in kept])
    if not found.texts:
        raise DataError(f"--images: {source} names no image.")
    return found


def read_texts(source: Path) -> Inputs:
    """The texts of a file, one per line.

    Raises:
        DataError: there is no such file, or no text in it.
    """
    if not source.is_file():
        raise DataError(f"--texts: there is no file '{source}'.")
    found = _lines(source)
    if not any(found.texts):
        raise DataError(f"--texts: {source} holds no text.")
    return found


def _lines(source: Path) -> Inputs:
    with open_text(source) as stream:
        texts = [line.strip() for line in stream]
    return Inputs(texts, [f"{source}:{number}" for number in range(1, len(texts) + 1)])


def _check_output(given: argparse.Namespace) -> None:
    if given.images is None and given.texts is None:
        raise ConfigError("Nothing to embed is given. Use --images, --texts or both.")
    if given.image_column is not None and given.images is None:
        raise ConfigError("--image-column: belongs to --images, which is not given.")
    if given.out.suffix not in KINDS:
        raise ConfigError(
            f"--out: given '{given.out}', allowed: a name that ends in .npz or .parquet."
        )
    if given.out.is_dir():
        raise ConfigError(f"--out: given '{given.out}', which is a folder.")
    there = next(one for one in given.out.absolute().parents if os.path.lexists(one))
    if not there.is_dir():
        raise ConfigError(f"--out: given '{given.out}', but {there} is a file, not a folder.")
    if given.out.suffix == ".parquet":
        if given.images is not None and given.texts is not None:
            raise ConfigError(
                "--out: a .parquet file holds one table, so it takes --images or --texts; .npz "
                "takes both."
            )
        if find_spec("pyarrow") is None:
            raise ConfigError(
                "--out: .parquet files need the package pyarrow, which the extra [parquet] brings."
            )


class _Job:
    """The model, loaded when the first part is missing, with the options of the command."""

    def __init__(self, given: argparse.Namespace, checkpoint: Path) -> None:
        self.given, self.checkpoint = given, checkpoint
        self.batch: int = given.batch_size
        self.bar: Any = None

    def plan(self, images: Inputs | None, texts: Inputs | None) -> dict[str, Any]:
        """Everything that the result depends on. Skipped errors do not change other rows."""
        plan: dict[str, Any] = {
            "checkpoint": _weights(self.checkpoint),
            "ema": self.given.ema,
            "normalize": self.given.normalize,
            "batch_size": self.batch,
            "precision": self.given.precision,
            "device": pick_device(self.given.device).type,
        }
        if images is not None:
            plan |= {"features": self.given.features, "images": _digest(map(_stat, images.texts))}
        if texts is not None:
            plan["texts"] = _digest(texts.texts)
        return plan

    @cached_property
    def model(self) -> TrainedModel:
        model = load(self.checkpoint, ema=self.given.ema, device=self.given.device)
        for wanted, ability in (
            (self.given.images, "embed_images"),
            (self.given.texts, "embed_texts"),
        ):
            if wanted is not None:
                model.require(ability)
        return model

    def images(self, inputs: Inputs) -> Any:
        """Return the function that embeds a part of the images."""

        def embed(start: int, stop: int) -> tuple[Any, list[str]]:
            stream = self.model.stream_images(
                inputs.texts[start:stop],
                features=self.given.features,
                normalize=self.given.normalize,
                batch_size=self.batch,
                precision=self.given.precision,
                on_error=self.given.on_error,
                workers=self.given.workers,
                progress=False,
            )
            parts: list[Tensor] = []
            errors: list[str] = []
            for rows, wrong in stream:
                parts.append(rows)
                errors += wrong
                self.bar.update(len(wrong))
            return torch.cat(parts).numpy(), errors

        return embed

    def texts(self, inputs: Inputs) -> Any:
        """Return the function that embeds a part of the texts; empty lines give rows of nan."""

        def embed(start: int, stop: int) -> tuple[Any, list[str]]:
            parts = []
            for first in range(start, stop, self.batch):
                texts = inputs.texts[first : min(first + self.batch, stop)]
                there = [bool(text) for text in texts]
                rows = self.model.embed_texts(
                    [text for text in texts if text] or ["."],
                    normalize=self.given.normalize,
                    batch_size=self.batch,
                    precision=self.given.precision,
                    progress=False,
                ).numpy()
                part = np.full((len(texts), rows.shape[1]), np.nan, dtype=np.float32)
                part[there] = rows[: sum(there)]
                parts.append(part)
                self.bar.update(len(texts))
            return np.concatenate(parts), [
                "" if t else "is empty" for t in inputs.texts[start:stop]
            ]

        return embed


def _weights(path: Path) -> str:
    """Return the identity of a checkpoint, including the files that older ones depend on."""
    if is_export(path):
        return sha256_of(path / MANIFEST)  # it lists the digests of all files
    state = read_header(path)
    around = []
    if not state.get("config"):
        around.append(path.parent / ZOO_CONFIG)
    if not state.get("data"):
        around += [path.parent / WORD_LIST, *sorted((path.parent / FOLDER).glob("*"))]
    digests = [sha256_of(one) for one in around if one.is_file()]
    return ":".join([sha256_of(path), *digests])


def _stat(path: str) -> str:
    """Return the identity of a file: path, size, times and inode.

    Only the system can set the change time (ctime): a file replaced by one of the same size and
    date has another one.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return path
    known = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    return "\0".join([path, *map(str, known)])


def _digest(texts: Any) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0\n")
    return digest.hexdigest()
