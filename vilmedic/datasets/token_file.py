"""Image tokens of a split, computed once by a frozen VAE and stored on disk.

The file is named by what the tokens follow from: the weights of the VAE, the content of every image
and how it is prepared. Names, places and times of the image files are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vilmedic.datasets.aligned import AlignedDataset
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.datasets.picture_cache import VERSION, decoders
from vilmedic.distributed import processes
from vilmedic.errors import ConfigError, DataError
from vilmedic.files import replacing
from vilmedic.log import Progress, progress

FOLDER = "tokens"  # in the run directory


class TokenFile:
    """The tokens of all lines of a split.

    Args:
        path: a NumPy file of unsigned integers [lines, N]; the largest integer marks lines whose
            image cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: NDArray[Any] | None = None

    def row(self, line: int) -> torch.Tensor | None:
        """int64 [N]; None for an image that cannot be decoded."""
        if self._rows is None:  # opened by each process that loads data
            self._rows = np.load(self.path, mmap_mode="r")
        row = self._rows[line]
        if row[0] == np.iinfo(row.dtype).max:
            return None
        return torch.from_numpy(row.astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_rows": None}


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
        DataError: image files were written to while tokens were made of them.
    """
    for part in dataset.parts:
        if isinstance(part, ImageDataset) and part.tokens == "cache" and part.token_rows is None:
            vae = getattr(getattr(model, "module", model), "vae", None)
            if vae is None:
                raise ConfigError(
                    f"dataset.image.tokens: given cache, but {type(model).__name__} makes no "
                    "tokens of images. Allowed: null, or model.proto=DALLE."
                )
            if part.pixels.random or part.views > 1 or part.multi_image > 1:
                raise ConfigError(
                    "dataset.image.tokens: given cache, but tokens are computed once, and these "
                    "images are several or differ from epoch to epoch. Set "
                    "dataset.image.preset=center_crop, without transforms, views and multi_image."
                )
            folder = part.run_dir / FOLDER
            # One process reads the files; the others find their digests where it left them.
            with processes.main_first(), Progress(f"Image tokens of {part.split}"):
                path = folder / f"{part.split}_{_key(part, vae, folder)}.npy"
                if not path.is_file():
                    with processes.alone():
                        rows = _rows(part, vae, device, num_workers)
                    folder.mkdir(parents=True, exist_ok=True)
                    with replacing(path, f".{os.getpid()}") as draft:
                        with open(draft, "wb") as stream:
                            np.save(stream, rows)
                        if path.name != f"{part.split}_{_key(part, vae, folder)}.npy":
                            raise DataError(
                                f"Images of {part.texts.path} were changed while tokens were made "
                                "of them. Start again when they are complete."
                            )
            part.token_rows = TokenFile(path).row


def _key(part: ImageDataset, vae: Any, folder: Path) -> str:
    """A hash of everything that the tokens depend on.

    Args:
        part: the images.
        vae: what makes tokens of them.
        folder: where digests of the image files are remembered.
    """
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    how: list[Any] = [VERSION, decoders(), vae.pixels.mean_and_std]
    how += [part.resize, part.crop, part.color, part.pixels.mean, part.pixels.std]
    how += [part.pixels.interpolation] if part.pixels.interpolation != "bilinear" else []
    how += [[repr(transform) for transform in part.pixels.transforms]]
    lines = [line for line in range(len(part.texts)) if line not in part.dropped]
    how += [len(part.texts), lines, part.pictures.contents(lines, folder)]
    digest.update(json.dumps(how).encode())
    return digest.hexdigest()[:16]


def _rows(
    part: ImageDataset, vae: Any, device: torch.device, num_workers: int | None
) -> NDArray[np.unsignedinteger[Any]]:
    """The tokens of a split, a row for each line."""
    length = (vae.image_size // 2**vae.num_layers) ** 2
    kind = np.dtype(np.uint16 if vae.num_tokens < np.iinfo(np.uint16).max else np.uint32)
    rows = np.full((len(part.texts), length), np.iinfo(kind).max, kind)
    loader = make_loader(part, batch_size=32, training=False, seed=0, num_workers=num_workers)
    for batch in progress(loader, f"Image tokens of {part.split}", "batches"):
        images = part.finish({"images": batch["images"].to(device)})["images"]
        codes = vae.get_codebook_indices(images).cpu().numpy()
        rows[part.kept[batch["index"].numpy()]] = codes.astype(kind)
    return rows
