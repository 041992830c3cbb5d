"""Subsets of the training split: a fraction, or the samples that a file lists."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vilmedic.datasets.aligned import AlignedDataset, stable_seed
from vilmedic.datasets.label import LabelDataset
from vilmedic.datasets.lines import Lines, brief, check_aligned, read_lines, shown, split_names
from vilmedic.distributed import processes
from vilmedic.errors import DataError, nearest
from vilmedic.files import open_regular, replace_text

logger = logging.getLogger(__name__)

TRAIN = "train"
PATIENTS = "patient.tok"
SUBSET_FILE = "train.ids.tok"
"""File in the run directory with the samples in use, one per line, as for `dataset.ids`."""


def keep_subset(
    dataset: AlignedDataset,
    *,
    split: str,
    fraction: float | None,
    seed: int,
    ids: str | None,
    run_dir: Path | None,
) -> None:
    """Restrict a data set to a part of its training split; other splits stay complete.

    Args:
        dataset: the data set; its `kept` lines are reduced.
        split: name of the split.
        fraction: the share of the samples to keep; None keeps all.
        seed: which samples these are.
        ids: a file that names the samples to keep instead; None for none.
        run_dir: folder for the names of the samples; None writes no file.

    Raises:
        DataError: the file cannot be read or names an unknown sample, or the file of patients
            does not fit.
    """
    if split != TRAIN or (fraction is None and ids is None):
        return
    texts = dataset.parts[0].texts
    if ids is not None:
        chosen = _named(Path(ids), texts, dataset.kept)
    else:
        assert fraction is not None
        chosen = share_of(
            dataset.kept,
            fraction,
            groups=_groups(texts, dataset.kept),
            labels=_labels(dataset, dataset.kept),
            seed=seed,
        )
    logger.info("%s: %d of %d samples are used", texts.path, len(chosen), len(dataset.kept))
    dataset.kept = chosen
    if run_dir is not None and processes.is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        names = [texts[line] for line in chosen.tolist()]
        replace_text(run_dir / SUBSET_FILE, "\n".join([*names, ""]))


def share_of(
    lines: NDArray[np.int64],
    fraction: float,
    *,
    groups: Sequence[str],
    labels: Sequence[Sequence[str]],
    seed: int,
) -> NDArray[np.int64]:
    """Return a share of some samples, stratified by label.

    All groups are put in one order, and every share takes its beginning: a smaller share is part of
    each larger one. Groups with the same rarest label are spread evenly over the order, and among
    these the groups with the same set of labels. Ties are broken by a hash of the group's name and
    the seed, so that the order is the same on every machine and for any order of the lines.

    Args:
        lines: numbers of the samples, [N].
        fraction: the share of the N samples, matched as closely as possible, with at least one
            group.
        groups: the group name of each sample.
        labels: the label names of each sample.
        seed: seed of the order.

    Returns:
        The samples that are taken, in ascending order.
    """
    sizes = Counter(groups)
    names: dict[str, set[str]] = {group: set() for group in sizes}
    for group, own in zip(groups, labels, strict=True):
        names[group].update(own)
    counts = Counter(name for own in labels for name in own)
    draw = {group: stable_seed(f"subset {group}", seed) for group in sizes}

    def kind(group: str) -> tuple[str, ...]:
        return tuple(sorted(names[group]))

    def rarest(group: str) -> tuple[str, ...]:
        return min(((counts[name], name) for name in names[group]), default=(0, ""))[1:]

    by_hash = sorted(sizes, key=lambda group: (draw[group], group))
    order = _spread(_spread(by_hash, kind, sizes, seed), rarest, sizes, seed)
    ends = np.cumsum([sizes[group] for group in order])
    taken = set(order[: 1 + int(np.argmin(np.abs(ends - fraction * len(lines))))])
    return np.array(
        [line for line, group in zip(lines.tolist(), groups, strict=True) if group in taken],
        dtype=np.int64,
    )


def _spread(
    order: Sequence[str],
    kind: Callable[[str], tuple[str, ...]],
    sizes: Counter[str],
    seed: int,
) -> list[str]:
    """Order groups so that those of each kind are spread evenly.

    Args:
        order: the groups.
        kind: returns the kind of a group.
        sizes: number of samples of each group.
        seed: of where each kind begins.
    """
    kinds: dict[tuple[str, ...], list[str]] = {}
    for group in order:
        kinds.setdefault(kind(group), []).append(group)
    places: dict[str, tuple[float, int]] = {}
    for name, members in kinds.items():
        total = sum(sizes[group] for group in members)
        start = stable_seed("\n".join(["kind", *name]), seed) / 2**64
        before = 0
        for group in members:
            places[group] = ((before + start * sizes[group]) / total, len(places))
            before += sizes[group]
    return sorted(places, key=places.__getitem__)


def _groups(texts: Lines, lines: NDArray[np.int64]) -> list[str]:
    """Return the groups of samples that stay together: of a patient, or else of equal lines."""
    path = texts.path.with_name(f"{TRAIN}.{PATIENTS}")
    named = texts
    if path.is_file():
        named = read_lines(str(path.parent), TRAIN, PATIENTS)
        check_aligned([texts, named])
    return [named[line] for line in lines.tolist()]


def _labels(dataset: AlignedDataset, lines: NDArray[np.int64]) -> list[list[str]]:
    """Return the labels of samples; empty if the data set has none."""
    part = next((one for one in dataset.parts if isinstance(one, LabelDataset)), None)
    if part is None:
        return [[] for _ in lines]
    return [[part.names[column] for column in part.columns(line)] for line in lines.tolist()]


def _named(path: Path, texts: Lines, lines: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the samples whose line, or one of whose images, is named in a file.

    A name is the path in the line file, a unique end of it, or a path that ends with it.
    """
    given = read_ids(path)
    whole: dict[str, set[int]] = {}
    last: dict[str, set[str]] = {}
    for line in lines.tolist():
        text = texts[line]
        for name in {text, *split_names(text)}:
            whole.setdefault(name, set()).add(line)
            last.setdefault(name.rpartition("/")[2], set()).add(name)
    chosen: set[int] = set()
    for number, name in given:
        found = whole.get(name)
        if found is None:
            near = last.get(name.rpartition("/")[2], set())
            fitting = [one for one in near if same_end(one, name)]
            found = {line for one in fitting for line in whole[one]}
            if len(fitting) > 1:
                raise DataError(
                    f"{path}:{number}: '{brief(name)}' may be any of {len(found)} samples: "
                    f"{shown(sorted(fitting))}. Give the path that {texts.path} has."
                )
        if not found:
            raise DataError(
                f"{path}:{number}: {texts.path} has no sample '{brief(name)}'."
                f"{nearest(name, whole)}"
            )
        chosen |= found
    return np.array(sorted(chosen), dtype=np.int64)


def same_end(one: str, other: str) -> bool:
    """Return whether one of two paths is the other, or the end of it."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def read_ids(path: Path) -> list[tuple[int, str]]:
    """The names in a file, one per line, each with the number of its line.

    Raises:
        DataError: there is no such file, it is no text, or it names nothing.
    """
    try:
        with open_regular(path) as stream:
            rows = stream.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"dataset.ids: {path} cannot be read: {error}.") from None
    given = [(number, row.strip()) for number, row in enumerate(rows, start=1) if row.strip()]
    if not given:
        raise DataError(f"dataset.ids: {path} names no sample.")
    return given
