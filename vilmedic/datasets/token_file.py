"""Cache of frozen network outputs for a split: image tokens and encoder features.

The name of a file is a hash of everything its content depends on: the weights of the network, the
content of every image or report and its preprocessing, but not the names, paths and times of image
files.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vilmedic.datasets.aligned import IMAGE_TOKENS, AlignedDataset, AlignedPart
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.device import inference, move, weights_converted_once
from vilmedic.distributed import processes
from vilmedic.errors import ConfigError, DataError
from vilmedic.files import FULL, replacing
from vilmedic.log import Progress, counted, progress

logger = logging.getLogger(__name__)

FOLDER = "tokens"  # in the run directory
FEATURES = "features"  # beside it
BATCH = 32  # samples per batch, also for the last ones of a split
DIGEST = 32  # bytes after the numbers of a file
LEFT = 3600  # seconds without a write after which a partial file is left over from a killed process

_in_use: set[Path] = set()


Encode = Callable[[dict[str, Any]], NDArray[Any]]


class TokenFile:
    """The rows of a split, such as image tokens, one per line.

    Args:
        path: a NumPy file [lines, N], followed by a digest of its content. Rows of the largest
            integer, or of nan, mark lines whose image cannot be decoded.
        lines: numbers of the lines, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """

    def __init__(self, path: Path, lines: NDArray[np.int64]) -> None:
        self.path, self.lines = path, lines
        digest, size = hashlib.blake2b(digest_size=DIGEST), path.stat().st_size
        with open(path, "rb") as file:
            left = size - DIGEST
            while left > 0 and (block := file.read(min(left, 2**24))):
                digest.update(block)
                left -= len(block)
            if left or file.read() != digest.digest():
                raise ValueError("its content is not what was written")
        self._rows: NDArray[Any] | None = None
        if len(self._mapped()) != len(lines):
            raise ValueError(
                f"it has {counted(len(self._mapped()), 'row')} for {counted(len(lines), 'line')}"
            )

    def row(self, line: int) -> Tensor | None:
        """Return the row of a line, [N]; None for an undecodable image."""
        row = self._mapped()[np.searchsorted(self.lines, line)]
        if row.dtype.kind == "f":
            return None if np.isnan(row[0]) else torch.from_numpy(row.copy())
        if row[0] == np.iinfo(row.dtype).max:
            return None
        if row.dtype == np.int16:  # the bits of bfloat16, which NumPy does not have
            return torch.from_numpy(row.copy()).view(torch.bfloat16)
        return torch.from_numpy(row.astype(np.int64))

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size

    def _mapped(self) -> NDArray[Any]:
        if self._rows is None:
            self._rows = np.load(self.path, mmap_mode="r")
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        # Other processes map the file again; pickling the map would copy its content.
        return {**self.__dict__, "_rows": None}


def cache_tokens(
    dataset: AlignedDataset, model: Any, device: torch.device, num_workers: int | None = None
) -> None:
    """Let a data set give image tokens instead of images, if `tokens: cache` asks for it.

    They are computed unless the run directory holds them for the same images, preprocessing and
    VAE.

    Args:
        dataset: the data set of a split; left as it is without `tokens: cache`.
        model: holds the frozen `vae`, on `device`.
        device: where to compute.
        num_workers: processes that load images.

    Raises:
        ConfigError: the model has no frozen VAE, or the images are augmented.
        DataError: image files changed while tokens were computed, or the tokens cannot be
            written.
    """
    for part in dataset.parts:
        if isinstance(part, ImageDataset) and part.tokens == "cache" and part.rows is None:
            vae = getattr(getattr(model, "module", model), "vae", None)
            if vae is None:
                raise ConfigError(
                    f"dataset.image.tokens: given cache, but {type(model).__name__} makes no "
                    "tokens of images. Allowed: null, or model.proto=DALLE."
                )
            if not part.fixed or part.views > 1 or part.multi_image > 1:
                raise ConfigError(
                    "dataset.image.tokens: given cache, but tokens are computed once, and these "
                    "images are several or differ from epoch to epoch. Set "
                    "dataset.image.preset=center_crop, without transforms, views and multi_image."
                )
            kind = np.dtype(np.uint16 if vae.num_tokens < np.iinfo(np.uint16).max else np.uint32)

            def encode(batch: dict[str, Any], vae: Any = vae, kind: Any = kind) -> NDArray[Any]:
                codes: NDArray[Any] = vae.get_codebook_indices(batch["images"]).cpu().numpy()
                return codes.astype(kind)

            rows = _Rows(dataset, part, "Image tokens", part.run_dir / FOLDER, device, num_workers)
            found, problem = rows.read_or_make(vae, [vae.pixels.mean_and_std], encode)
            if found is None:
                raise DataError(
                    f"The image tokens of {part.texts.path} cannot be kept: {problem}. Make room, "
                    "or set dataset.image.tokens=null."
                )
            part.rows = (IMAGE_TOKENS, found.row)


def cache_features(
    dataset: AlignedDataset,
    model: Any,
    device: torch.device,
    *,
    precision: str,
    gib: float,
    folder: Path,
    num_workers: int | None = None,
) -> None:
    """Let a data set give the features of frozen encoders instead of their inputs.

    They are computed unless the run directory holds them for the same content, preprocessing,
    weights and arithmetic. Encoders that are partly trained, or whose input differs between epochs,
    are not cached. If features cannot be written, a warning is logged and they are computed in
    each epoch.

    Args:
        dataset: the data set of a split; from now on only for this model.
        model: the model, whose `towers` are cached; on `device`.
        device: where to compute.
        precision: `fp32`, `bf16` or `fp16`.
        gib: most GiB of features in the folder; 0 caches none.
        folder: the run directory.
        num_workers: processes that load images.

    Raises:
        DataError: files changed while features were computed.
    """
    waiting = [part for part in dataset.parts if part.features and not part.tried]
    if not gib or not waiting:
        return
    mode = model.training
    towers = {name: tower for name, tower in model.train().towers().items() if tower.frozen()}
    model.train(mode)
    for part in waiting:
        tower = towers.get(part.features)
        if tower is None or part.rows is not None or getattr(part, "tokens", None):
            continue
        part.tried = True
        if not part.fixed or (tower.dropout and getattr(part, "multi_image", 1) > 1):
            if getattr(part, "training", True):
                logger.info(
                    "The %s is frozen, but what it is given differs from epoch to epoch, so it is "
                    "computed in each. It is computed once with %s.",
                    tower.name,
                    part.fixed_by,
                )
            continue

        def encode(batch: dict[str, Any], tower: Any = tower) -> NDArray[Any]:
            features = tower.encode(batch)
            if not torch.isfinite(features).all():
                raise _NotKept("they hold values that are not finite")
            features = features.cpu()
            if features.dtype == torch.bfloat16:  # which NumPy does not have
                features = features.view(torch.int16)
            return features.numpy()

        what = f"Features of the frozen {tower.name}"
        rows = _Rows(dataset, part, what, folder / FEATURES, device, num_workers, precision, gib)
        settings = [tower.settings, str(tower.network), torch.__version__, precision]
        settings += [_arithmetic(device)]
        with _in_evaluation(model), weights_converted_once(device, precision, tower.network):
            found, problem = rows.read_or_make(tower.network, settings, encode)
        if found is not None:
            part.rows = (part.features, found.row)
            if not model.reads_tokens:
                part.leave_out_tokens(rows.lines)
        else:
            logger.warning(
                "%s, split %s, are not kept: %s. They are computed in every epoch.",
                what,
                rows.split,
                problem,
            )


class _NotKept(Exception):
    """Reason why features are not cached; does not end the run."""


class _Rows:
    """Rows of a split in a folder, read or computed.

    Args:
        dataset: the data set, whose samples count.
        part: the part of it that is encoded.
        what: name of the rows, for messages.
        folder: folder of the files.
        device: where to compute.
        num_workers: loading processes.
        precision: `fp32`, `bf16` or `fp16`.
        gib: most GiB in the folder; None for no limit.
    """

    def __init__(
        self,
        dataset: AlignedDataset,
        part: AlignedPart,
        what: str,
        folder: Path,
        device: torch.device,
        num_workers: int | None,
        precision: str = "fp32",
        gib: float | None = None,
    ) -> None:
        self.what, self.folder, self.device, self.precision = what, folder, device, precision
        self.num_workers = num_workers
        self.limit = None if gib is None else int(gib * 2**30)
        self.split = part.split
        self.lines: NDArray[np.int64] = np.unique(dataset.kept)
        # The same files, restricted to the lines that are samples of the whole data set.
        self.part = copy.copy(part)
        self.part.parts, self.part.kept = (self.part,), self.lines

    def read_or_make(
        self, network: nn.Module, settings: list[Any], encode: Encode
    ) -> tuple[TokenFile | None, str]:
        """Return the file of the rows, or why there is none, the same in all processes.

        Args:
            network: its weights are part of the name.
            settings: everything else that the rows depend on.
            encode: computes the rows of a prepared batch.

        Raises:
            DataError: files changed while rows were computed.
        """
        found: list[TokenFile] = []

        def attempt() -> str:
            try:
                found.append(self._file(lambda: self._path(network, settings), encode))
            except OSError as error:
                full = error.errno in FULL
                reason = "the disk is full" if full else error.strerror or str(error)
                return f"{reason} ({self.folder})"
            except _NotKept as error:
                return str(error)
            return ""

        # The main process reads and computes; the others then find its file.
        with Progress(f"{self.what}, split {self.split}"):
            problem = processes.on_main(attempt)
            if not problem and not found:
                problem = attempt()
        # The file is used in all processes or in none.
        problems = [one for one in processes.gather(problem) if one]
        return (None, problems[0]) if problems else (found[0], "")

    def _file(self, path: Callable[[], Path], encode: Encode) -> TokenFile:
        wanted = path()
        try:
            file = TokenFile(wanted, self.lines)
            with suppress(OSError):
                # The least recently used file is removed first.
                os.utime(wanted, ns=(time.time_ns(), wanted.stat().st_mtime_ns))
            how = "read"
        except FileNotFoundError:
            file, how = self._make(wanted, path, encode), "computed"
        except (ValueError, OSError) as error:
            logger.warning("%s is damaged (%s) and is made again", wanted, error)
            file, how = self._make(wanted, path, encode), "computed"
        _in_use.add(wanted)
        logger.info(
            "%s, split %s: %s once for %s, %.1f MiB in %s",
            self.what,
            self.split,
            how,
            counted(len(self.lines), "sample"),
            file.size / 2**20,
            wanted,
        )
        return file

    def _make(self, wanted: Path, path: Callable[[], Path], encode: Encode) -> TokenFile:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.tmp"):
            if time.time() - left.stat().st_mtime > LEFT:
                left.unlink(missing_ok=True)
        with replacing(wanted, f".{os.getpid()}", sync=True) as draft:
            with open(draft, "wb") as stream, processes.alone():
                self._write(stream, encode)
            if path() != wanted:
                raise DataError(
                    f"Files of {self.part.texts.path} were changed while {self.what[0].lower()}"
                    f"{self.what[1:]} were made of them. Start again when they are complete."
                )
        return TokenFile(wanted, self.lines)

    def _write(self, stream: IO[bytes], encode: Encode) -> None:
        """Compute and write batch after batch, in the order of the lines."""
        digest = hashlib.blake2b(digest_size=DIGEST)

        def write(content: bytes) -> None:
            digest.update(content)
            stream.write(content)

        done, empty = 0, b""
        for index, rows in self._batches(encode):
            if not empty:
                header = io.BytesIO()
                shape = (len(self.lines), rows.shape[1])
                described = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(header, described)
                self._make_room(len(self.lines) * rows[0].nbytes)
                write(header.getvalue())
                empty = np.full_like(rows[0], _absent(rows.dtype)).tobytes()
            for place, row in zip(index, rows, strict=True):
                write(empty * (place - done) + row.tobytes())
                done = place + 1
        if not empty:
            raise DataError(f"{self.part.texts.path}: no sample can be read.")
        write(empty * (len(self.lines) - done))
        stream.write(digest.digest())

    def _batches(self, encode: Encode) -> Iterator[tuple[list[int], NDArray[Any]]]:
        """Yield sample numbers and their rows."""
        loader = make_loader(
            self.part, batch_size=BATCH, training=False, seed=0, num_workers=self.num_workers
        )
        name = f"{self.what}, split {self.split}"
        try:
            for batch in progress(loader, name, "batches"):
                index = batch["index"].tolist()
                # Batches have a constant size: the rounding of a product may depend on it.
                every = torch.arange(BATCH) % len(index)
                batch = move({key: value[every] for key, value in batch.items()}, self.device)
                with inference(self.device, self.precision):
                    rows = encode(self.part.finish(batch))[: len(index)]
                yield index, rows
        finally:
            loader.close()

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files until another one fits.

        Raises:
            _NotKept: it would not fit.
        """
        if self.limit is None:
            return
        others = sorted(
            (file.stat().st_atime, file.stat().st_size, file) for file in self.folder.glob("*.npy")
        )
        left = self.limit - size - sum(held for _, held, _ in others)
        for _, held, file in others:
            if left < 0 and file not in _in_use:
                file.unlink(missing_ok=True)
                left += held
        if left < 0:
            raise _NotKept(
                f"they take {size / 2**20:,.1f} MiB, more than trainor.frozen_cache_gib="
                f"{self.limit / 2**30:g} leaves"
            )

    def _path(self, network: nn.Module, settings: list[Any]) -> Path:
        """Return the file, whose name holds a hash of everything that the rows depend on."""
        digest = hashlib.sha256()
        for name, value in sorted(network.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy())
        how = [BATCH, settings, self.lines.tolist(), self.part.content(self.lines, self.folder)]
        digest.update(json.dumps(how).encode())
        kind = "" if self.limit is None else f"{self.part.features}_"
        return self.folder / f"{self.split}_{kind}{digest.hexdigest()[:16]}.npy"


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore its modes afterwards."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def _absent(kind: np.dtype[Any]) -> Any:
    """Return the row of an undecodable image, which no feature or token can equal."""
    return np.nan if kind.kind == "f" else np.iinfo(kind).max


def _arithmetic(device: torch.device) -> list[Any]:
    """Return the settings that affect the last bits of a feature, besides its precision."""
    if device.type != "cuda":
        return [device.type]
    return [torch.cuda.get_device_name(device), torch.backends.cuda.matmul.allow_tf32]
