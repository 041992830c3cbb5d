"""The features of a split as files, for work outside this project."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.files import spreadsheet_text
from vilmedic.post_processing.contract import PostProcessing


class SaveRepresentation(PostProcessing):
    """Writes the features of every sample.

    `<split>_representation.npz` holds each feature [N, D], `index` [N], and with labels `labels`
    [N, L] and `label_names` [L]; it loads with `numpy.load` without pickles. Row by row the same,
    `<split>_representation.csv` holds the line number, image paths and label names.

    Args:
        keys: the features to write; null writes all.
    """

    def __init__(self, *, keys: list[str] | None = None) -> None:
        self.keys = keys

    def check(self, evaluation: Evaluation) -> None:
        """Refuse features that the model does not give."""
        for key in self.keys or ():
            evaluation.check_feature(key, "save_representation.keys")

    def __call__(self, evaluation: Evaluation) -> list[Path]:
        """Write both files of a split."""
        split = evaluation.features
        arrays = {key: split.features[key].numpy() for key in self.keys or split.features}
        arrays["index"] = split.index.numpy()
        if split.labels is not None:
            arrays["labels"] = split.labels.numpy().astype(np.uint8)
            arrays["label_names"] = np.array(split.label_names)
        stem = evaluation.out_dir / f"{evaluation.split}_representation"
        npz, table = stem.with_suffix(".npz"), stem.with_suffix(".csv")
        np.savez(npz, **arrays)  # type: ignore[arg-type]
        index = split.index.tolist()
        with open(table, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["line", "image", "labels"])
            for line, i in zip(evaluation.line_numbers(index), index, strict=True):
                shown = evaluation.dataset.describe(i)
                images = ",".join(str(path) for path in shown.get("image", ()))
                labels = ",".join(shown.get("labels", ()))
                writer.writerow([line, *map(spreadsheet_text, (images, labels))])
        return [npz, table]
