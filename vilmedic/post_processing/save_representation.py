"""Export of the features of a split as files."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from scipy.sparse import csr_array

from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.files import spreadsheet_text
from vilmedic.post_processing.contract import PostProcessing

BLOCK = 1 << 24  # bytes of labels written at a time


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
            evaluation.check_feature(key, "keys", compared=False)

    def __call__(self, evaluation: Evaluation) -> list[Path]:
        """Write both files of a split."""
        split = evaluation.features
        arrays = {key: split.features[key].numpy() for key in self.keys or split.features}
        arrays["index"] = split.index.numpy()
        if split.labels is not None:
            arrays["label_names"] = np.array(split.label_names)
        stem = evaluation.out_dir / f"{evaluation.split}_representation"
        npz, table = stem.with_suffix(".npz"), stem.with_suffix(".csv")
        with zipfile.ZipFile(npz, "w", allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            if split.labels is not None:
                with archive.open("labels.npy", "w", force_zip64=True) as member:
                    _write_labels(member, split.labels)
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


def _write_labels(stream: IO[bytes], labels: csr_array) -> None:
    """Write sparse labels [N, L] as an array of zeros and ones, some rows at a time."""
    described = {"descr": "|u1", "fortran_order": False, "shape": labels.shape}
    np.lib.format.write_array_header_1_0(stream, described)
    rows = max(1, BLOCK // labels.shape[1])
    for first in range(0, labels.shape[0], rows):
        stream.write(labels[first : first + rows].toarray().astype(np.uint8).tobytes())
