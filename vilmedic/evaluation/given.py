"""Evaluation of embeddings from another program, by the same protocols."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn

from vilmedic.config import build
from vilmedic.config.declared import REPORTS
from vilmedic.config.trained import VOCABULARY, data_parts
from vilmedic.datasets.label import LabelDataset
from vilmedic.datasets.lines import brief, shown
from vilmedic.datasets.subset import same_end
from vilmedic.device import pick_device
from vilmedic.errors import ConfigError, DataError
from vilmedic.evaluation.ensemblor import Ensemblor
from vilmedic.evaluation.evaluation import Ensemble
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.files import sha256_of
from vilmedic.log import counted
from vilmedic.registry import DATASETS

if TYPE_CHECKING:
    from vilmedic.config.load import Config

logger = logging.getLogger(__name__)

IMAGES = ("visual", "visual_backbone")
FORM = (
    "Expected: an .npz file with visual [N, D] (and visual_backbone [N, F], if there is one) and "
    "the image paths path [N]; for protocols with texts linguistic [M, D] and text [M]"
)
ROUNDING = 1e-2
"""Share of the largest number of a row: embeddings of one input in half precision are as close."""


class Embeddings(nn.Module):
    """Placeholder for the unknown model of the embeddings."""


class GivenEmbeddings(Ensemble):
    """Embeddings of images and texts, looked up by path and by text.

    Args:
        path: an `.npz` file, as `bin/embed.py` writes it: `visual` and `path`, `linguistic` and
            `text`.
        networks: the networks that the protocols would otherwise use.

    Raises:
        DataError: the file cannot be read, or is not of this form.
    """

    def __init__(self, path: Path, networks: Ensemble) -> None:
        super().__init__(
            members=[Embeddings],
            dataset=networks.dataset,
            loader=networks.loader,
            device=networks.device,
            precision="fp32",
        )
        self.path = path
        arrays = read_arrays(path)
        self.images = {name: arrays[name] for name in IMAGES if name in arrays}
        self.texts = arrays.get("linguistic")
        self._paths = {str(one): row for row, one in enumerate(arrays["path"].tolist())}
        self._last: dict[str, list[str]] = {}
        for one in self._paths:
            self._last.setdefault(PurePath(one).name, []).append(one)
        names = arrays["text"].tolist() if "text" in arrays else []
        self._texts = {str(one): row for row, one in enumerate(names)}

    def split(self, name: str) -> SplitFeatures:
        """The embeddings of the samples of a split, in their order.

        Raises:
            DataError: some have none.
        """
        if name not in self._splits:
            self._splits[name] = self._read(name)
        return self._splits[name]

    def preview(self, name: str, loader: Any) -> SplitFeatures:
        """Return the whole split, as nothing needs to be computed."""
        return self.split(name)

    def forget(self) -> None:
        """Drop the splits."""
        self._splits.clear()

    def encode_text(self, dataset: Any, texts: Sequence[str]) -> Tensor | None:
        """The embeddings of texts [P, D]; None where the file has none at all.

        Raises:
            DataError: the file lacks some of them.
        """
        if self.texts is None:
            return None
        if missing := [text for text in texts if text not in self._texts]:
            raise DataError(
                f"{self.path}: text lacks {len(missing)} of {len(texts)} texts that are needed: "
                f"{shown(missing)}."
            )
        return torch.from_numpy(self.texts[[self._texts[text] for text in texts]])

    def _read(self, name: str) -> SplitFeatures:
        dataset = self.dataset(name)
        described = [dataset.describe(index) for index in range(len(dataset))]
        rows = [self._row(one.get("image") or []) for one in described]
        if missing := [
            one["image"][0] for one, row in zip(described, rows, strict=True) if row < 0
        ]:
            raise DataError(
                f"{self.path}: path lacks {len(missing)} of the {len(rows)} images of the split "
                f"'{name}': {shown(missing)}."
            )
        features = {key: torch.from_numpy(value[rows]) for key, value in self.images.items()}
        reports = [one["report"] for one in described if "report" in one]
        if reports and self.texts is not None:
            encoded = self.encode_text(dataset, reports)
            assert encoded is not None
            features["linguistic"] = encoded
        spec = dataset.spec
        part = next((one for one in dataset.parts if isinstance(one, LabelDataset)), None)
        lines = dataset.kept.tolist()
        labels = unknown = None
        if part is not None:
            labels = _table([part.columns(line) for line in lines], len(spec.labels))
            unknown = _table([part.unknown(line) for line in lines], len(spec.labels))
        return SplitFeatures(
            split=name,
            index=torch.arange(len(dataset)),
            features=features,
            labels=labels,
            unknown=unknown if unknown is not None and unknown.nnz else None,
            label_names=spec.labels,
            multi_label=spec.multi_label,
        )

    def _row(self, images: Sequence[str]) -> int:
        """The row of a sample's first image; -1 if there is none.

        Its path is the same, or one is the end of the other: the images may have been elsewhere.
        """
        if not images:
            return -1
        place = images[0]
        if place in self._paths:
            return self._paths[place]
        near = self._last.get(PurePath(place).name, [])
        fitting = [one for one in near if same_end(one.removeprefix("./"), place)]
        if len(fitting) > 1:
            raise DataError(
                f"{self.path}: the image {brief(place)} may be any of {len(fitting)} rows: "
                f"{shown(fitting)}. Give the path as the data set has it."
            )
        return self._paths[fitting[0]] if fitting else -1


class GivenEnsemblor(Ensemblor):
    """Evaluates embeddings of another program as `Ensemblor` evaluates checkpoints.

    Args:
        config: the checked configuration; its section `model` is ignored.
        path: the file.

    Raises:
        ConfigError: a requested step needs a model.
        DataError: the file, or a split, cannot be used.
    """

    def __init__(self, config: Config, path: Path) -> None:
        self.config, self.section, self.run_dir = config, config.ensemblor, config.run_dir
        if self.section.generate_images:
            raise ConfigError("ensemblor.generate_images: embeddings make no images.")
        if "untrained" in self.section.baselines:
            logger.warning(
                "The baseline untrained is left out: the network of other embeddings is not known"
            )
            self.section = replace(
                self.section,
                baselines=[one for one in self.section.baselines if one != "untrained"],
            )
        read_arrays(path)
        self._make_vocabulary()
        self.device = pick_device(self.section.device)
        self.file, self.paths, self.changed = path, [path], {}
        self.system = path.stem
        self.checkpoints = [{"file": path.name, "sha256": sha256_of(path)}]
        self._set_up(f"embeddings-{path.stem}", {path: {}}, ema=False)

    def _make_vocabulary(self) -> None:
        """Build the vocabulary from the training split, as a training would.

        No report is encoded here, but a data set of reports needs its vocabulary.
        """
        parts = dict(data_parts(self.config.data["dataset"]))
        made = (self.run_dir / VOCABULARY).is_dir()
        if REPORTS in parts and parts[REPORTS][1].get("tokenizer") is None and not made:
            given = {"split": "train", "training": True, "run_dir": self.run_dir}
            build(DATASETS, self.config.dataset, seed=self.section.seed, **given)

    def _trained(self) -> Ensemble:
        return GivenEmbeddings(self.file, self.splits.networks([Embeddings]))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file of embeddings, checked.

    Raises:
        DataError: it cannot be read, or is not of this form.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = (*IMAGES, "path", "linguistic", "text")
            arrays = {name: archive[name] for name in wanted if name in archive.files}
    except Exception as error:  # zip, zlib and numpy raise different kinds
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: cannot be read ({reason}). {FORM}.") from None
    if not any(name in arrays for name in IMAGES) or "path" not in arrays:
        raise DataError(f"{path}: holds {', '.join(arrays) or 'none of these arrays'}. {FORM}.")
    if ("linguistic" in arrays) != ("text" in arrays):
        raise DataError(f"{path}: holds linguistic or text, but not both. {FORM}.")
    for name in (*IMAGES, "linguistic"):
        if name in arrays:
            arrays[name] = _rows(path, name, arrays)
            _check_twice(path, name, arrays)
    if "visual" in arrays and "linguistic" in arrays:
        widths = arrays["visual"].shape[1], arrays["linguistic"].shape[1]
        if widths[0] != widths[1]:
            raise DataError(
                f"{path}: visual has {counted(widths[0], 'column')} and linguistic {widths[1]}, "
                "so that they "
                "cannot be compared."
            )
    return arrays


def _rows(path: Path, name: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """An array of embeddings as float32."""
    value, key = arrays[name], "text" if name == "linguistic" else "path"
    fits = value.ndim == 2 and np.issubdtype(value.dtype, np.floating)
    if not fits or arrays[key].shape != value.shape[:1] or arrays[key].dtype.kind != "U":
        raise DataError(
            f"{path}: {name} is {value.dtype} {list(value.shape)} and {key} is "
            f"{arrays[key].dtype} {list(arrays[key].shape)}; expected are numbers [N, D] "
            "and texts [N]."
        )
    return value.astype(np.float32)


def _check_twice(path: Path, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Refuse different embeddings of one image or text, except for rounding."""
    rows, key = arrays[name], "text" if name == "linguistic" else "path"
    known: dict[str, int] = {}
    for row, one in enumerate(arrays[key].tolist()):
        first = known.setdefault(one, row)
        if first != row and not np.allclose(
            rows[first], rows[row], rtol=0, atol=ROUNDING * np.abs(rows[row]).max(), equal_nan=True
        ):
            raise DataError(
                f"{path}: {key} has {brief(one)} in the rows {first} and {row}, counted from 0, "
                f"but {name} is not the same there. Give each one embedding."
            )


def _table(rows: Sequence[NDArray[np.int32]], classes: int) -> csr_array:
    """Return the columns of each row as a sparse table, bool [N, L]."""
    columns = np.concatenate([np.empty(0, np.int32), *rows])
    starts = np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))
    shape = (len(rows), classes)
    return csr_array((np.ones(len(columns), np.bool_), columns, starts), shape=shape)
