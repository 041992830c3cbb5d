"""Labels, one or several a line."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vilmedic.config.types import Runtime
from vilmedic.datasets.aligned import AlignedPart, Batch, Sample
from vilmedic.datasets.lines import Lines, brief, read_lines, shown
from vilmedic.errors import DataError, nearest
from vilmedic.files import replace_text

LABELS_FILE = "labels.json"  # in the run directory


class LabelDataset(AlignedPart):
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
        path = Path(run_dir) / LABELS_FILE
        if path.is_file():
            names, several = _read_saved(path)
        else:
            names, several = _names(_all_splits(root, file))
            _save(path, {"labels": names, "multi_label": several})
        self.names = tuple(names)
        self.multi_label = several if multi_label is None else multi_label
        self._starts, self._columns = _columns(texts, self.names, path, single=not self.multi_label)
        super().__init__(texts)

    def columns(self, line: int) -> NDArray[np.int32]:
        """The numbers of the labels of a line, in ascending order."""
        return self._columns[self._starts[line] : self._starts[line + 1]]

    def counts(self, lines: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of some lines have each label: [L]."""
        chosen = np.zeros(len(self.texts), np.bool_)
        chosen[lines] = True
        counted = self._columns[np.repeat(chosen, np.diff(self._starts))]
        return np.bincount(counted, minlength=len(self.names))

    def read(self, line: int, epoch: int) -> Sample:
        """The numbers of a line's labels, int32: a row of all classes would be long and empty."""
        return {"labels": self.columns(line)}

    def stack(self, samples: Sequence[Sample]) -> Batch:
        """Batch the labels: `labels` float32 [B, L] with several a sample, else int64 [B]."""
        rows = [torch.from_numpy(sample["labels"].astype(np.int64)) for sample in samples]
        if not self.multi_label:
            return {"labels": torch.cat(rows)}
        labels = torch.zeros(len(rows), len(self.names))
        for row, columns in enumerate(rows):
            labels[row, columns] = 1.0
        return {"labels": labels}

    def show(self, line: int) -> dict[str, Any]:
        """The label names of a line, in the order of the columns."""
        return {"labels": [self.names[column] for column in self.columns(line)]}

    def properties(self) -> dict[str, Any]:
        """The label names and whether a sample may have several."""
        return {"labels": self.names, "multi_label": self.multi_label}


def saved_labels(run_dir: Path) -> tuple[tuple[str, ...], bool]:
    """The label names of a run, and whether a sample may have several; none when it keeps none."""
    try:
        saved = json.loads((run_dir / LABELS_FILE).read_text(encoding="utf-8"))
        return tuple(map(str, saved["labels"])), bool(saved["multi_label"])
    except (OSError, ValueError, LookupError, TypeError):
        return (), False


def label_counts(dataset: Any) -> dict[str, int] | None:
    """How many samples of a data set have each label; None for data without this kind of labels."""
    for part in getattr(dataset, "parts", ()):
        if isinstance(part, LabelDataset):
            return dict(zip(part.names, part.counts(dataset.kept).tolist(), strict=True))
    return None


def _rows(texts: Lines) -> Iterator[list[str]]:
    """The label names of each line, each once."""
    for line, text in enumerate(texts):
        row = [name.strip() for name in text.split(",")]
        if "" in row:
            raise DataError(f"{texts.where(line)} has an empty label between commas.")
        yield list(dict.fromkeys(row))


def _names(splits: Iterable[Lines]) -> tuple[list[str], bool]:
    """All label names, sorted, and whether any line has several."""
    names: set[str] = set()
    several = False
    for texts in splits:
        for row in _rows(texts):
            names.update(row)
            several = several or len(row) > 1
    return sorted(names), several


def _all_splits(root: str, file: str) -> Iterator[Lines]:
    """The label files of all splits in a folder, one at a time."""
    for path in sorted(Path(root).glob(f"*.{file}")):
        split = path.name.removesuffix(f".{file}")
        if "." not in split:
            yield read_lines(root, split, file)


def _columns(
    texts: Lines, names: Sequence[str], source: Path, *, single: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The labels of all lines one behind the other, as numbers, and where each line starts."""
    numbers = {name: column for column, name in enumerate(names)}
    starts, columns = array("q", [0]), array("i")
    for line, row in enumerate(_rows(texts)):
        if unknown := [name for name in row if name not in numbers]:
            raise DataError(
                f"{texts.where(line)} has the label '{brief(unknown[0])}', which {source} does not "
                f"list: {shown(names)}.{nearest(unknown[0], names)}"
            )
        if single and len(row) > 1:
            raise DataError(f"{texts.where(line)} has {len(row)} labels; set multi_label=true.")
        columns.extend(sorted(numbers[name] for name in row))
        starts.append(len(columns))
    return np.array(starts, dtype=np.int64), np.array(columns, dtype=np.int32)


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
