"""What a frozen network computes from a split, computed once and stored on disk.

These are the image tokens of a VAE and the features of frozen encoders. A file is named by what it
follows from: the weights of the network, the content of every image or report and how it is
prepared. Names, places and times of the image files are not part of it.
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
from vilmedic.log import Progress, progress

logger = logging.getLogger(__name__)

FOLDER = "tokens"  # in the run directory
FEATURES = "features"  # beside it
BATCH = 32  # samples that are computed together, the last ones of a split too
DIGEST = 32  # bytes behind the numbers of a file
LEFT = 3600  # seconds after which a file that nobody has gone on writing is one of a killed process

_in_use: set[Path] = set()


Encode = Callable[[dict[str, Any]], NDArray[Any]]


class TokenFile:
    """The rows of the lines of a split, such as their image tokens.

    Args:
        path: a NumPy file [lines, N], with a digest of its content behind it. Rows of the largest
            integer, or of numbers that are none, mark lines whose image cannot be decoded.
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
            raise ValueError(f"it has {len(self._mapped())} rows for {len(lines)} lines")

    def row(self, line: int) -> Tensor | None:
        """What was made of a line, [N]; None for an image that cannot be decoded."""
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
        """Bytes on the disk."""
        return self.path.stat().st_size

    def _mapped(self) -> NDArray[Any]:
        if self._rows is None:
            self._rows = np.load(self.path, mmap_mode="r")
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        # Other processes map the file themselves; the map would be sent as its content.
        return {**self.__dict__, "_rows": None}


def cache_tokens(
    dataset: AlignedDataset, model: Any, device: torch.device, num_workers: int | None = None
) -> None:
    """Let a data set give image tokens instead of images, if `tokens: cache` asks for it.

    They are computed unless the run directory has them, for the same images, the same preparation
    and the same VAE.

    Args:
        dataset: the data set of a split; left as it is without `tokens: cache`.
        model: holds the frozen `vae`, on `device`.
        device: where to compute.
        num_workers: processes that load images.

    Raises:
        ConfigError: the model has no frozen VAE, or the images are changed at random.
        DataError: image files were written to while tokens were made of them, or the tokens cannot
            be written.
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
    """Let a data set give the features of frozen encoders in place of what they are made from.

    They are computed unless the run directory has them, for the same content, preparation, weights
    and arithmetic. An encoder that is trained in part, or whose input differs from epoch to epoch,
    is left as it is. That features cannot be written is a warning: they are computed in each epoch.

    Args:
        dataset: the data set of a split; from now on for this model alone.
        model: whose `towers` are asked; on `device`.
        device: where to compute.
        precision: `fp32`, `bf16` or `fp16`.
        gib: most GiB that features take in the folder; 0 keeps none.
        folder: the run directory.
        num_workers: processes that load images.

    Raises:
        DataError: files were written to while features were made of them.
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
    """Why features are not kept, which ends no run."""


class _Rows:
    """The rows of a split in a folder, read or made.

    Args:
        dataset: the data set, whose samples count.
        part: what of it is encoded.
        what: what the rows are, for messages.
        folder: where they are kept.
        device: where to compute.
        num_workers: processes that load.
        precision: `fp32`, `bf16` or `fp16`.
        gib: most GiB that the folder may hold; None sets no bound.
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
        self.room = None if gib is None else int(gib * 2**30)
        self.split = part.split
        self.lines: NDArray[np.int64] = np.unique(dataset.kept)
        # The same files, and of their lines those that are samples of the whole data set.
        self.part = copy.copy(part)
        self.part.parts, self.part.kept = (self.part,), self.lines

    def read_or_make(
        self, network: nn.Module, settings: list[Any], encode: Encode
    ) -> tuple[TokenFile | None, str]:
        """The file of the rows, or why there is none, in all processes alike.

        Args:
            network: its weights are part of the name.
            settings: whatever else the rows depend on.
            encode: makes the rows of a prepared batch.

        Raises:
            DataError: files were written to while rows were made of them.
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

        # The main process reads and computes; the others find what it has left.
        with Progress(f"{self.what}, split {self.split}"):
            problem = processes.on_main(attempt)
            if not problem and not found:
                problem = attempt()
        # Without the file in one process, it is used in none.
        problems = [one for one in processes.gather(problem) if one]
        return (None, problems[0]) if problems else (found[0], "")

    def _file(self, path: Callable[[], Path], encode: Encode) -> TokenFile:
        wanted = path()
        try:
            file = TokenFile(wanted, self.lines)
            with suppress(OSError):
                # What was unused for longest makes room first.
                os.utime(wanted, ns=(time.time_ns(), wanted.stat().st_mtime_ns))
            how = "read"
        except FileNotFoundError:
            file, how = self._make(wanted, path, encode), "computed"
        except (ValueError, OSError) as error:
            logger.warning("%s is damaged (%s) and is made again", wanted, error)
            file, how = self._make(wanted, path, encode), "computed"
        _in_use.add(wanted)
        logger.info(
            "%s, split %s: %s once for %d samples, %.1f MiB in %s",
            self.what,
            self.split,
            how,
            len(self.lines),
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
        """Compute batch after batch and write it, in the order of the lines."""
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
        """Numbers of samples and what is made of them."""
        loader = make_loader(
            self.part, batch_size=BATCH, training=False, seed=0, num_workers=self.num_workers
        )
        name = f"{self.what}, split {self.split}"
        try:
            for batch in progress(loader, name, "batches"):
                index = batch["index"].tolist()
                # Always as many samples: a product may round by the number of its rows.
                every = torch.arange(BATCH) % len(index)
                batch = move({key: value[every] for key, value in batch.items()}, self.device)
                with inference(self.device, self.precision):
                    rows = encode(self.part.finish(batch))[: len(index)]
                yield index, rows
        finally:
            loader.close()

    def _make_room(self, size: int) -> None:
        """Remove what was unused for longest until there is room for one more file.

        Raises:
            _NotKept: it would not fit.
        """
        if self.room is None:
            return
        others = sorted(
            (file.stat().st_atime, file.stat().st_size, file) for file in self.folder.glob("*.npy")
        )
        left = self.room - size - sum(held for _, held, _ in others)
        for _, held, file in others:
            if left < 0 and file not in _in_use:
                file.unlink(missing_ok=True)
                left += held
        if left < 0:
            raise _NotKept(
                f"they take {size / 2**20:,.1f} MiB, more than trainor.frozen_cache_gib="
                f"{self.room / 2**30:g} leaves"
            )

    def _path(self, network: nn.Module, settings: list[Any]) -> Path:
        """The file, whose name holds a hash of everything that the rows depend on."""
        digest = hashlib.sha256()
        for name, value in sorted(network.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy())
        how = [BATCH, settings, self.lines.tolist(), self.part.content(self.lines, self.folder)]
        digest.update(json.dumps(how).encode())
        kind = "" if self.room is None else f"{self.part.features}_"
        return self.folder / f"{self.split}_{kind}{digest.hexdigest()[:16]}.npy"


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and as it was afterwards."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def _absent(kind: np.dtype[Any]) -> Any:
    """What a row holds whose image cannot be decoded: no feature is that, and no token."""
    return np.nan if kind.kind == "f" else np.iinfo(kind).max


def _arithmetic(device: torch.device) -> list[Any]:
    """What decides on the last bits of a feature, besides its precision."""
    if device.type != "cuda":
        return [device.type]
    return [torch.cuda.get_device_name(device), torch.backends.cuda.matmul.allow_tf32]
