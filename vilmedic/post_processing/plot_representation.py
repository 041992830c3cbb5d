"""Scatter plots of embeddings, coloured by label."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from vilmedic.config.types import AtLeast
from vilmedic.drawing.colours import COLOURS, SHAPES
from vilmedic.drawing.scatter import draw_scatter
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.files import spreadsheet_text
from vilmedic.post_processing.contract import PostProcessing
from vilmedic.post_processing.projection import (
    FEWEST,
    NAMES,
    Method,
    all_alike,
    fitting_method,
    project,
)

logger = logging.getLogger(__name__)

MOST = len(COLOURS) * len(SHAPES)
REST = -1  # the class of samples that have none of the labels, or several
_FEATURES = {
    "visual": "Image embeddings",
    "linguistic": "Report embeddings",
    "visual_backbone": "Image features in front of the projection",
    "linguistic_backbone": "Report features in front of the projection",
}


class PlotRepresentation(PostProcessing):
    """Scatter plots of features in the plane, coloured by label.

    For each key and split `<split>_full_<key>.png`, all samples; and where a class has more than
    `max_samples_per_class`, `<split>_sampled_<key>.png`, at most so many of each class, mapped
    again so that a frequent class does not dominate the plot. Coloured are samples with exactly
    one of `labels_keep`; the others lie in grey under them. Next to each plot are the `.npz`
    (`embedding` [n, 2], `labels` [n], empty for the grey ones, `index` [n]) and the `.csv` (line,
    x, y, label) it was drawn from. A label has the same colour in every plot and page. UMAP and
    t-SNE show neighbourhoods: distances between groups and their sizes mean nothing.

    Args:
        keys: the features to plot, such as visual and linguistic.
        labels_keep: the labels to draw, in the order of the legend; null draws all, or of very
            many the 64 most frequent, which is as many as can be told apart.
        max_samples_per_class: cap of the sampled plot; null leaves that plot out.
        method: how features are mapped to the plane; null takes UMAP, and PCA below a hundred
            samples.
    """

    def __init__(
        self,
        *,
        keys: list[str],
        labels_keep: list[str] | None = None,
        max_samples_per_class: Annotated[int, AtLeast(1)] | None = 250,
        method: Method | None = None,
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
        one = np.asarray(kept.sum(axis=1) == 1).ravel()
        classes = np.full(len(features), REST, dtype=np.int64)
        classes[one] = kept[np.flatnonzero(one)].indices
        exactly = (
            f"{one.sum():,} of {len(features):,} samples have exactly one of {len(names)} labels"
        )
        logger.info("plot_representation, split %s: %s", evaluation.split, exactly)
        if one.sum() < FEWEST:
            logger.warning("plot_representation: fewer than %d samples, nothing drawn.", FEWEST)
            return []
        every = np.arange(len(features))
        some, cap = every, self.max_samples_per_class
        # Fewer of the grey ones alone would show the same coloured samples again.
        if cap is not None and np.bincount(classes[one]).max() > cap:
            some = capped(classes, cap, evaluation.seed)
        files: list[Path] = []
        for key in self.keys:
            value = evaluation.feature(key)
            if value is None or all_alike(x := value.flatten(1).numpy()):
                logger.warning(
                    "plot_representation: every sample of '%s' has the same '%s', not drawn.",
                    evaluation.split,
                    key,
                )
                continue
            for kind, rows in (("full", every), ("sampled", some)):
                if kind == "sampled" and len(rows) == len(every):
                    continue  # the same plot
                if len(rows) < FEWEST:
                    logger.warning("plot_representation: sampled plot of fewer than %d.", FEWEST)
                    continue
                method = fitting_method(self.method, len(rows))
                points = project(x[rows], method=method, seed=evaluation.seed)
                shown = (names, columns.tolist(), classes[rows])
                files += self._draw(evaluation, key, kind, method, exactly, rows, shown, points)
        return files

    def _draw(
        self,
        evaluation: Evaluation,
        key: str,
        kind: str,
        method: Method,
        exactly: str,
        rows: NDArray[np.int64],
        shown: tuple[list[str], list[int], NDArray[np.int64]],
        points: NDArray[np.float32],
    ) -> list[Path]:
        """Write one plot and its data."""
        names, places, classes = shown
        stem = evaluation.out_dir / f"{evaluation.split}_{kind}_{key}"
        png, npz, table = (stem.with_name(f"{stem.name}.{end}") for end in ("png", "npz", "csv"))
        index = evaluation.features.index.numpy()[rows]
        labels = np.array([*names, ""])[classes]  # REST is the last one
        np.savez_compressed(npz, embedding=points, labels=labels, index=index)
        with open(table, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["line", "x", "y", "label"])
            lines = evaluation.line_numbers(index)
            for line, (x, y), label in zip(lines, points.tolist(), labels, strict=True):
                writer.writerow([line, f"{x:.6g}", f"{y:.6g}", spreadsheet_text(str(label))])
        most = self.max_samples_per_class or 0
        capped_at = "" if kind == "full" else f"; at most {most:,} a class drawn"
        name = NAMES[method]
        draw_scatter(
            png,
            points,
            classes,
            names,
            places=places,
            title=f"{_FEATURES.get(key, key)} of {evaluation.data}, {evaluation.split} split",
            caption=f"{name}; {exactly}{capped_at}\n{evaluation.title}",
            axes=(f"{name} 1", f"{name} 2"),
        )
        return [png, npz, table]


def capped(classes: NDArray[np.int64], cap: int, seed: int) -> NDArray[np.int64]:
    """Positions of at most `cap` randomly chosen samples of each class, in ascending order.

    Those without a class count as one more.
    """
    order = np.random.default_rng(seed).permutation(len(classes))
    chosen = [order[classes[order] == k][:cap] for k in np.unique(classes)]
    return np.sort(np.concatenate(chosen))
