"""Labels, one or several per line."""

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
UNKNOWN = "?"
"""Prefix of a label that is unknown for a sample: `Edema,?Pneumonia`."""


class LabelDataset(AlignedPart):
    """Label names read from `<root>/<split>.<file>`, several on a line separated by commas.

    A line names the labels that its sample has; all others are absent. A label with a question mark
    in front (`Edema,?Pneumonia`) is unknown: neither present nor absent, it counts in no loss and
    in no number of its class. Where there are such labels a sample may have several.

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
        saved = path.is_file()
        names, several = find_labels(root, file, path)
        if not saved:
            _save(path, {"labels": names, "multi_label": several})
        self.names = tuple(names)
        self.multi_label = several if multi_label is None else multi_label
        single = not self.multi_label
        self._starts, self._columns = _columns(texts, self.names, path, single=single)
        self._unknown = _columns(texts, self.names, path, single=single, unknown=True)
        super().__init__(texts)

    def columns(self, line: int) -> NDArray[np.int32]:
        """The numbers of the labels of a line, in ascending order."""
        return self._columns[self._starts[line] : self._starts[line + 1]]

    def unknown(self, line: int) -> NDArray[np.int32]:
        """The numbers of the labels that are unknown on a line, in ascending order."""
        starts, columns = self._unknown
        return columns[starts[line] : starts[line + 1]]

    def counts(self, lines: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the lines with each label: [L]."""
        return self._counts(lines, self._starts, self._columns)

    def unknown_counts(self, lines: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the lines on which each label is unknown: [L]."""
        return self._counts(lines, *self._unknown)

    def _counts(
        self, lines: NDArray[np.int64], starts: NDArray[np.int64], columns: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        chosen = np.zeros(len(self.texts), np.bool_)
        chosen[lines] = True
        counted = columns[np.repeat(chosen, np.diff(starts))]
        return np.bincount(counted, minlength=len(self.names))

    def read(self, line: int, epoch: int) -> Sample:
        """Return a line's label numbers, int32: a multi-hot row would be long and sparse."""
        sample: Sample = {"labels": self.columns(line)}
        if len(self._unknown[1]):
            sample["unknown_labels"] = self.unknown(line)
        return sample

    def stack(self, samples: Sequence[Sample]) -> Batch:
        """Batch the labels: `labels` float32 [B, L] with several per sample, else int64 [B].

        Where the split has unknown ones also `labels_known`, bool [B, L].
        """
        rows = [torch.from_numpy(sample["labels"].astype(np.int64)) for sample in samples]
        if not self.multi_label:
            return {"labels": torch.cat(rows)}
        labels = torch.zeros(len(rows), len(self.names))
        for row, columns in enumerate(rows):
            labels[row, columns] = 1.0
        if "unknown_labels" not in samples[0]:
            return {"labels": labels}
        known = torch.ones(labels.shape, dtype=torch.bool)
        for row, sample in enumerate(samples):
            known[row, torch.from_numpy(sample["unknown_labels"].astype(np.int64))] = False
        return {"labels": labels, "labels_known": known}

    def show(self, line: int) -> dict[str, Any]:
        """The label names of a line, in the order of the columns."""
        return {"labels": [self.names[column] for column in self.columns(line)]}

    def properties(self) -> dict[str, Any]:
        """The label names and whether a sample may have several."""
        return {"labels": self.names, "multi_label": self.multi_label}

    def counted(self, lines: NDArray[np.int64]) -> dict[str, Any]:
        """Return how many of the lines have each label, and how many do not."""
        present = self.counts(lines)
        absent = len(lines) - present - self.unknown_counts(lines)
        return {"positives": tuple(present.tolist()), "negatives": tuple(absent.tolist())}


def find_labels(root: str, file: str, saved: Path) -> tuple[list[str], bool]:
    """Return the labels of a data set, and whether a sample may have several.

    Args:
        root: folder that holds the line files.
        file: name of the line files after the split.
        saved: the file that holds the labels of a run; without it, all label files are read.

    Raises:
        DataError: a file is damaged.
    """
    return _read_saved(saved) if saved.is_file() else _names(_all_splits(root, file))


def saved_labels(run_dir: Path) -> tuple[tuple[str, ...], bool]:
    """Read a run's label names, and whether a sample may have several; none without a file."""
    try:
        saved = json.loads((run_dir / LABELS_FILE).read_text(encoding="utf-8"))
        return tuple(map(str, saved["labels"])), bool(saved["multi_label"])
    except (OSError, ValueError, LookupError, TypeError):
        return (), False


def label_counts(dataset: Any) -> dict[str, int] | None:
    """Count the samples per label in a data set; None for data without such labels."""
    for part in getattr(dataset, "parts", ()):
        if isinstance(part, LabelDataset):
            return dict(zip(part.names, part.counts(dataset.kept).tolist(), strict=True))
    return None


def read_labels(text: str) -> tuple[list[str], list[str]]:
    """Parse a line into present and unknown labels, each once.

    Raises:
        ValueError: there is no name between two commas or behind a question mark, or a label is
            both there and unknown.
    """
    present: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for name in text.split(","):
        name = name.strip()
        bare = name.removeprefix(UNKNOWN).strip()
        if not bare:
            raise ValueError(
                f"a '{UNKNOWN}' without a label" if name else "an empty label between commas"
            )
        (unknown if name.startswith(UNKNOWN) else present)[bare] = None
    if both := present.keys() & unknown.keys():
        raise ValueError(f"the label '{brief(min(both))}' both as there and as unknown")
    return list(present), list(unknown)


def _rows(texts: Lines) -> Iterator[tuple[list[str], list[str]]]:
    """The labels of each line, and those that are unknown."""
    for line, text in enumerate(texts):
        try:
            yield read_labels(text)
        except ValueError as error:
            raise DataError(f"{texts.where(line)} has {error}.") from None


def _names(splits: Iterable[Lines]) -> tuple[list[str], bool]:
    """Return all label names, sorted, and whether any line has several or unknown ones."""
    names: set[str] = set()
    several = False
    for texts in splits:
        for present, unknown in _rows(texts):
            names.update(present, unknown)
            several = several or len(present) > 1 or bool(unknown)
    return sorted(names), several


def _all_splits(root: str, file: str) -> Iterator[Lines]:
    """The label files of all splits in a folder, one at a time."""
    for path in sorted(Path(root).glob(f"*.{file}")):
        split = path.name.removesuffix(f".{file}")
        if "." not in split:
            yield read_lines(root, split, file)


def _columns(
    texts: Lines, names: Sequence[str], source: Path, *, single: bool, unknown: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the offset of each line's labels, and the labels of all lines in a row.

    Args:
        texts: the lines.
        names: the labels, in the order of their numbers.
        source: where these come from, for messages.
        single: whether a line has exactly one label.
        unknown: take the unknown labels instead.
    """
    numbers = {name: column for column, name in enumerate(names)}
    starts, columns = array("q", [0]), array("i")
    for line, rows in enumerate(_rows(texts)):
        row = rows[unknown]
        if strange := [name for name in row if name not in numbers]:
            raise DataError(
                f"{texts.where(line)} has the label '{brief(strange[0])}', which {source} does not "
                f"list: {shown(names)}.{nearest(strange[0], names)}"
            )
        if single and unknown and row:
            raise DataError(
                f"{texts.where(line)} has labels that are unknown; set multi_label=true."
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
            "delete the file: it is rebuilt from them."
        ) from None
    return names, bool(several)


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    replace_text(path, text, writer=f".{os.getpid()}")  # every process may be making it
