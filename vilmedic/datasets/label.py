"""Labels, one or several a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vilmedic.config.types import Runtime
from vilmedic.datasets.aligned import Batch, Part, Sample
from vilmedic.datasets.lines import Lines, brief, read_lines, shown
from vilmedic.errors import DataError, nearest
from vilmedic.files import replace_text

LABELS_FILE = "labels.json"  # in the run directory


class LabelDataset(Part):
    """Label names read from `<root>/<split>.<file>`, several on a line separated by commas.

    The list of labels is that of all splits in `root`, sorted: rare labels often miss in a training
    split. It is kept in the run directory as `labels.json` from the first use of labels on, be that
    training or a later evaluation, and later splits are held to it.

    Args:
        root: folder that holds the line files.
        file: name of the line files after the split.
        multi_label: whether a sample may have several labels; null finds out from the line files.
    """

    def __init__(
        self,
        *,
        split: Runtime[str],
        run_dir: Runtime[Path],
        root: str,
        file: str = "label.tok",
        multi_label: bool | None = None,
    ) -> None:
        texts = read_lines(root, split, file)
        rows = _parse(texts)
        every = [row for other in _all_splits(root, file) for row in _parse(other)]
        path = Path(run_dir) / LABELS_FILE
        if path.is_file():
            names, several = _read_saved(path)
        else:
            names = sorted({name for row in every for name in row})
            several = any(len(row) > 1 for row in every)
            _save(path, {"labels": names, "multi_label": several})
        self.names = tuple(names)
        self.multi_label = several if multi_label is None else multi_label
        self.targets = _targets(rows, texts, self.names, path)
        if not self.multi_label:
            _check_single(rows, texts)
        super().__init__(texts)

    def read(self, line: int, epoch: int) -> Sample:
        """The labels of a line as uint8 zeros and ones [L]."""
        return {"labels": self.targets[line]}

    def stack(self, samples: Sequence[Sample]) -> Batch:
        """Batch the labels: `labels` float32 [B, L] with several a sample, else int64 [B]."""
        targets = torch.from_numpy(np.stack([sample["labels"] for sample in samples]))
        return {"labels": targets.float() if self.multi_label else targets.argmax(dim=1)}

    def show(self, line: int) -> dict[str, Any]:
        """The label names of a line, in the order of the columns."""
        return {"labels": [self.names[column] for column in np.flatnonzero(self.targets[line])]}

    def properties(self) -> dict[str, Any]:
        """The label names and whether a sample may have several."""
        return {"labels": self.names, "multi_label": self.multi_label}


def label_counts(dataset: Any) -> dict[str, int] | None:
    """How many samples of a data set have each label; None for data without this kind of labels."""
    for part in getattr(dataset, "parts", ()):
        if isinstance(part, LabelDataset):
            counts = part.targets[dataset.kept].sum(axis=0, dtype=np.int64).tolist()
            return dict(zip(part.names, counts, strict=True))
    return None


def _parse(texts: Lines) -> list[list[str]]:
    rows = [[name.strip() for name in text.split(",")] for text in texts]
    for line, row in enumerate(rows):
        if "" in row:
            raise DataError(f"{texts.where(line)} has an empty label between commas.")
    return [list(dict.fromkeys(row)) for row in rows]


def _all_splits(root: str, file: str) -> list[Lines]:
    """The label files of all splits in a folder."""
    paths = sorted(Path(root).glob(f"*.{file}"))
    splits = [path.name.removesuffix(f".{file}") for path in paths]
    return [read_lines(root, split, file) for split in splits if "." not in split]


def _targets(rows: list[list[str]], texts: Lines, names: Sequence[str], source: Path) -> np.ndarray:
    columns = {name: column for column, name in enumerate(names)}
    targets = np.zeros((len(rows), len(names)), np.uint8)
    for line, row in enumerate(rows):
        for name in row:
            if name not in columns:
                raise DataError(
                    f"{texts.where(line)} has the label '{brief(name)}', which {source} does not "
                    f"list: {shown(names)}.{nearest(name, names)}"
                )
            targets[line, columns[name]] = 1
    return targets


def _check_single(rows: list[list[str]], texts: Lines) -> None:
    for line, row in enumerate(rows):
        if len(row) > 1:
            raise DataError(f"{texts.where(line)} has {len(row)} labels; set multi_label=true.")


def _read_saved(path: Path) -> tuple[list[str], bool]:
    """The labels of a run, and whether a sample may have several.

    Raises:
        DataError: the file is damaged.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        names, several = saved["labels"], saved["multi_label"]
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError("labels are no list of names")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: is damaged ({type(error).__name__}: {error}). It lists the labels of the "
            "run in the order that its model knows. If the line files are those of its training, "
            "delete the file: it is made again from them."
        ) from None
    return names, bool(several)


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    replace_text(path, text, writer=f".{os.getpid()}")  # every process may be making it
