"""Pictures of what a model places beside what."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from vilmedic.config.types import AtLeast
from vilmedic.drawing.scatter import COLOURS, SHAPES, draw_scatter
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.files import spreadsheet_text
from vilmedic.post_processing.contract import PostProcessing
from vilmedic.post_processing.projection import FEWEST, NAMES, all_alike, project

logger = logging.getLogger(__name__)

MOST = len(COLOURS) * len(SHAPES)


class PlotRepresentation(PostProcessing):
    """Scatter plots of features in the plane, coloured by label.

    For each key and split two plots, `<split>_{full,sampled}_<key>.png`: all samples, and at most
    so many of each class, mapped again so that a frequent class does not shape the picture. Beside
    each stand the `.npz` (`embedding` [n, 2], `labels` [n], `index` [n]) and the `.csv` (line,
    x, y, label) it was drawn from. Of samples with several labels those with exactly one of
    `labels_keep` are drawn. UMAP and t-SNE show neighbourhoods: distances between groups and
    their sizes mean nothing.

    Args:
        keys: the features to plot, such as visual and linguistic.
        labels_keep: the labels to draw, in the order of the legend; null draws all, or of very
            many the 64 most frequent, which is as many as can be told apart.
        max_samples_per_class: cap of the sampled plot; null leaves that plot out.
        method: how features are mapped to the plane.
    """

    def __init__(
        self,
        *,
        keys: list[str],
        labels_keep: list[str] | None = None,
        max_samples_per_class: Annotated[int, AtLeast(1)] | None = 250,
        method: Literal["umap", "tsne", "pca"] = "umap",
    ) -> None:
        self.keys = keys
        self.labels_keep = labels_keep
        self.max_samples_per_class = max_samples_per_class
        self.method = method

    def check(self, evaluation: Evaluation) -> None:
        """Refuse features that the model does not give and labels that the data does not have."""
        for key in self.keys:
            evaluation.check_feature(key, "keys")
        if evaluation.features.labels is not None:
            for label in self.labels_keep or ():
                evaluation.check_label(label, "labels_keep")

    def __call__(self, evaluation: Evaluation) -> list[Path]:
        """Draw the plots of a split; skips with one line what cannot be drawn."""
        features = evaluation.features
        if features.labels is None:
            logger.warning(
                "plot_representation: no labels on the split '%s', so no plot is drawn. Add %s",
                evaluation.split,
                LABEL_OVERRIDES,
            )
            return []
        names = list(dict.fromkeys(self.labels_keep or features.label_names))
        places = {name: column for column, name in enumerate(features.label_names)}
        columns = np.array([places[name] for name in names], dtype=np.int64)
        by_column = features.labels.tocsc()
        if self.labels_keep is None and len(names) > MOST:
            columns = np.sort(np.argsort(-by_column.sum(axis=0), kind="stable")[:MOST])
            names = [features.label_names[column] for column in columns]
            logger.info("plot_representation: the %d most frequent of %d labels", MOST, len(places))
        kept = by_column[:, columns].tocsr()
        rows = np.flatnonzero(kept.sum(axis=1) == 1)
        classes = kept[rows].indices.astype(np.int64)
        exactly = (
            f"{len(rows):,} of {len(features):,} samples have exactly one of {len(names)} labels"
        )
        logger.info("plot_representation, split %s: %s", evaluation.split, exactly)
        if len(rows) < FEWEST:
            logger.warning("plot_representation: fewer than %d samples, nothing drawn.", FEWEST)
            return []
        files: list[Path] = []
        for key in self.keys:
            value = evaluation.feature(key)
            if value is None or all_alike(x := value.flatten(1).numpy()[rows]):
                logger.warning(
                    "plot_representation: every sample of '%s' has the same '%s', not drawn.",
                    evaluation.split,
                    key,
                )
                continue
            every = np.arange(len(rows))
            points = project(x, method=self.method, seed=evaluation.seed)
            draw = (evaluation, key, names, exactly)
            files += self._draw(*draw, "full", rows, classes, points)
            if self.max_samples_per_class is None:
                continue
            some = capped(classes, self.max_samples_per_class, evaluation.seed)
            if len(some) < FEWEST:
                logger.warning("plot_representation: sampled plot of fewer than %d.", FEWEST)
                continue
            if len(some) < len(every):
                points = project(x[some], method=self.method, seed=evaluation.seed)
            files += self._draw(*draw, "sampled", rows[some], classes[some], points)
        return files

    def _draw(
        self,
        evaluation: Evaluation,
        key: str,
        names: list[str],
        exactly: str,
        kind: str,
        rows: NDArray[np.int64],
        classes: NDArray[np.int64],
        points: NDArray[np.float32],
    ) -> list[Path]:
        """Write one plot and its data."""
        stem = evaluation.out_dir / f"{evaluation.split}_{kind}_{key}"
        png, npz, table = (stem.with_name(f"{stem.name}.{end}") for end in ("png", "npz", "csv"))
        index = evaluation.features.index.numpy()[rows]
        labels = np.array(names)[classes]
        np.savez_compressed(npz, embedding=points, labels=labels, index=index)
        with open(table, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["line", "x", "y", "label"])
            lines = evaluation.line_numbers(index)
            for line, (x, y), label in zip(lines, points.tolist(), labels, strict=True):
                writer.writerow([line, f"{x:.6g}", f"{y:.6g}", spreadsheet_text(str(label))])
        method = NAMES[self.method]
        shown = "" if kind == "full" else f"; at most {self.max_samples_per_class:,} a class drawn"
        draw_scatter(
            png,
            points,
            classes,
            names,
            title=f"{evaluation.split}: {key}, {method}",
            caption=f"{exactly}{shown}\n{evaluation.title}",
            axes=(f"{method} 1", f"{method} 2"),
        )
        return [png, npz, table]


def capped(classes: NDArray[np.int64], cap: int, seed: int) -> NDArray[np.int64]:
    """Positions of at most `cap` randomly chosen samples of each class, in ascending order."""
    order = np.random.default_rng(seed).permutation(len(classes))
    chosen = [order[classes[order] == k][:cap] for k in np.unique(classes)]
    return np.sort(np.concatenate(chosen))
