"""Data of the embedding explorer on the report page."""

from __future__ import annotations

import gzip
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from vilmedic.config.types import Between
from vilmedic.drawing.images import thumbnails
from vilmedic.errors import escaped
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.files import replace_bytes
from vilmedic.post_processing.contract import PostProcessing
from vilmedic.post_processing.projection import (
    FEWEST,
    NAMES,
    Method,
    all_alike,
    fitting_method,
    nearest_samples,
    project,
)

logger = logging.getLogger(__name__)

PREFERRED = ("visual", "linguistic")
LONGEST = 1500  # letters of a report


class ExploreRepresentation(PostProcessing):
    """Samples, their places on a map and their neighbours, `<split>_explorer.json.gz`.

    `report.html` shows it as a scatter plot with X-rays and reports. It holds images and texts of
    patients: share it only with people who may see the data. Neighbours are by cosine similarity
    of the features, not by distance on the map. For images and reports in one space, it also holds
    the reports nearest to an image and the images nearest to a report.

    Args:
        keys: the features to map; null takes visual and linguistic, or else all embeddings
            there are.
        max_samples: samples of a split that are shown, drawn at random.
        method: how features are mapped to the plane; null takes UMAP, and PCA below a hundred
            samples.
        neighbours: nearest samples to find for each sample.
    """

    def __init__(
        self,
        *,
        keys: list[str] | None = None,
        max_samples: Annotated[int, Between(3, 1000000)] = 2500,
        method: Method | None = None,
        neighbours: Annotated[int, Between(1, 10000)] = 10,
    ) -> None:
        self.keys, self.max_samples = keys, max_samples
        self.method, self.neighbours = method, neighbours

    def check(self, evaluation: Evaluation) -> None:
        """Refuse features that the model does not give."""
        for key in self.keys or ():
            evaluation.check_feature(key, "keys")

    def __call__(self, evaluation: Evaluation) -> list[Path]:
        """Write the file of a split; nothing where the model gives no features."""
        split = evaluation.features
        rows = sampled(len(split), self.max_samples, evaluation.seed)
        features = self._features(evaluation, rows)
        if not features:
            logger.info("explore_representation: nothing to map on '%s'.", evaluation.split)
            return []
        content = {
            "run": escaped(evaluation.name),
            "split": evaluation.split,
            "total": len(split),
            "source": evaluation.source,
            "labels": [escaped(name) for name in split.label_names],
            "samples": _samples(evaluation, rows),
            "maps": [self._map(key, value, evaluation.seed) for key, value in features.items()],
            "neighbours": self._neighbours(features),
        }
        path = evaluation.out_dir / f"{evaluation.split}_explorer.json.gz"
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        replace_bytes(path, gzip.compress(text.encode(), 6, mtime=0))
        return [path]

    def _features(
        self, evaluation: Evaluation, rows: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        """The features to map that are finite and not the same for all samples."""
        available = evaluation.features.features
        keys = self.keys or [key for key in PREFERRED if key in available]
        if not keys:  # not numbers of codes, whose distances mean nothing, nor single numbers
            keys = [k for k, v in available.items() if v.is_floating_point() and v[0].numel() > 1]
        features = {}
        for key in keys:
            value = evaluation.feature(key)
            if value is None or len(rows) < FEWEST:
                continue
            x = value.flatten(1).numpy()[rows]
            if all_alike(x):
                logger.warning("explore_representation: all samples have the same '%s'.", key)
                continue
            features[key] = x
        return features

    def _map(self, key: str, features: NDArray[np.float32], seed: int) -> dict[str, Any]:
        method = fitting_method(self.method, len(features))
        points = project(features, method=method, seed=seed)
        low, high = points.min(axis=0), points.max(axis=0)
        places = ((points - low) / np.maximum(high - low, 1e-12)).round(4)
        # Rounded in double precision: in float32 every number would be written with ten digits.
        x, y = places.astype(np.float64).round(4).T.tolist()
        return {"key": key, "method": NAMES[method], "x": x, "y": y}

    def _neighbours(self, features: dict[str, NDArray[np.float32]]) -> list[dict[str, Any]]:
        pairs = [(f"same {key}", key, key) for key in features]
        if set(PREFERRED) <= features.keys():
            image, report = (features[key] for key in PREFERRED)
            if image.shape == report.shape:
                pairs.append(("reports for this image", "visual", "linguistic"))
                pairs.append(("images for this report", "linguistic", "visual"))
        found = []
        for name, query, target in pairs:
            index, cosine = nearest_samples(
                features[query], features[target], self.neighbours, itself=query != target
            )
            rounded = cosine.astype(np.float64).round(3).tolist()
            found.append({"name": name, "index": index.tolist(), "cosine": rounded})
        return found


def sampled(count: int, most: int, seed: int) -> NDArray[np.int64]:
    """Row numbers in ascending order, all or a random choice."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _samples(evaluation: Evaluation, rows: NDArray[np.int64]) -> dict[str, list[Any]]:
    """Line, report, image paths, labels and thumbnail of each row."""
    index = evaluation.features.index.numpy()[rows].tolist()
    described = [evaluation.dataset.describe(i) for i in index]
    columns: dict[str, list[Any]] = {
        "line": evaluation.line_numbers(index),
        "report": [_cut(escaped(str(one.get("report", "")))) for one in described],
        "image": [
            escaped(", ".join(Path(path).name for path in one.get("image", ())))
            for one in described
        ],
        "thumbnail": _thumbnails(evaluation, index),
    }
    labels = evaluation.features.labels
    if labels is not None:
        some = labels[rows]
        some.sort_indices()
        columns["labels"] = [
            some.indices[first:last].tolist() for first, last in pairwise(some.indptr)
        ]
    return columns


def _thumbnails(evaluation: Evaluation, index: list[int]) -> list[str]:
    dataset = evaluation.dataset
    parts = (part for part in getattr(dataset, "parts", ()) if hasattr(part, "original"))
    images = next(parts, None)
    if images is None:
        return ["" for _ in index]
    return thumbnails(lambda i: images.original(dataset, i)[0], index)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
