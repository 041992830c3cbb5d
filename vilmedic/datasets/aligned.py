"""What all data sets share: samples are lines, and a sample may have several parts."""

from __future__ import annotations

import dataclasses
import logging
import operator
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vilmedic.datasets.lines import Lines, check_aligned, listed
from vilmedic.datasets.sample import SampleKey
from vilmedic.datasets.spec import DataSpec
from vilmedic.errors import DataError

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Batch = dict[str, Any]
TOLERATED = 0.01  # largest share of bad samples that `on_error: skip` leaves out


class AlignedDataset(Dataset[Sample]):
    """Samples made of one or several parts that are read from the same lines of their files.

    Args:
        parts: what a sample consists of; messages name lines of the first one's file.

    Raises:
        DataError: the files of the parts have different numbers of lines, or more samples than
            tolerated are left out.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts
        check_aligned([part.texts for part in parts])
        self.skipped: dict[int, str] = {}
        self._reported = 0
        total = len(parts[0].texts)
        dropped = {line for part in parts for line in part.dropped}
        every = np.arange(total)
        self.kept = np.delete(every, sorted(dropped)) if dropped else every
        for part in parts:
            self.skip(part.dropped)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """A sample: as a loader asks for it, or by its number alone, which is epoch 0.

        Raises:
            IndexError: there is no sample of that number; numbers below 0 count from the end.
        """
        if not isinstance(key, SampleKey):
            index = operator.index(key)
            if not -len(self) <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            key = SampleKey(index % len(self))
        line = int(self.kept[key.index])
        sample: Sample = {"index": key.index}
        for part in self.parts:
            sample |= part.read(line, key.epoch)
        return sample

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into a batch.

        Returns:
            `index` int64 [B] and the keys of each part.
        """
        batch: Batch = {"index": torch.tensor([sample["index"] for sample in samples])}
        for part in self.parts:
            batch |= part.stack(samples)
        return batch

    def order(self, *, seed: int, epoch: int, batch_size: int) -> torch.Tensor | None:
        """The order of the samples in a pass of training, where this data set has one of its own.

        Args:
            seed: seed of the order.
            epoch: the pass over the data.
            batch_size: samples that are taken together.

        Returns:
            int64 [len(self)], each sample once; None when any random order will do.
        """
        return None

    def prepare(self, batch: Batch) -> Batch:
        """The part of the processing that runs batched, on the device that holds the batch."""
        for part in self.parts:
            batch = part.finish(batch)
        return batch

    @property
    def spec(self) -> DataSpec:
        """What a model must know of the data."""
        known = {name: value for part in self.parts for name, value in part.properties().items()}
        return dataclasses.replace(DataSpec(), **known)

    def describe(self, index: int) -> dict[str, Any]:
        """A sample as a person reads it: `image` (paths), `report`, `labels` (names)."""
        line = int(self.kept[index])
        return {name: value for part in self.parts for name, value in part.show(line).items()}

    def lines(self, indices: Iterable[int] | torch.Tensor) -> list[str]:
        """`file:line` of samples, given by their positions in the data set."""
        return [self.parts[0].texts.where(int(self.kept[int(index)])) for index in indices]

    def tolerates(self, error: Exception) -> bool:
        """Whether a sample that raised `error` is left out instead of ending the run."""
        return any(part.tolerates(error) for part in self.parts)

    def skip(self, reasons: dict[int, str]) -> None:
        """Note lines that are left out, each with the reason.

        Raises:
            DataError: more than one in a hundred lines of the split is bad.
        """
        self.skipped.update(reasons)
        total = len(self.parts[0].texts)
        if len(self.skipped) > TOLERATED * total:
            bad = listed(list(self.skipped.values()), "bad sample").rstrip(".")
            raise DataError(
                f"{bad}. That is more than "
                f"{TOLERATED:.0%} of the {total} samples of {self.parts[0].texts.path}, which is "
                "the most that on_error=skip leaves out."
            )

    def report_skipped(self) -> None:
        """Log what was left out since the last report."""
        new = list(self.skipped.values())[self._reported :]
        if new:
            logger.warning(
                "Left out %s (%d of %d so far)",
                listed(new, "bad sample"),
                len(self.skipped),
                len(self.parts[0].texts),
            )
        self._reported = len(self.skipped)


class Part(AlignedDataset):
    """A data set of one file, which can also be a part of the samples of another data set.

    Args:
        texts: the lines of its file.
        dropped: lines that cannot be used, with the reason; left out of every sample.
    """

    def __init__(self, texts: Lines, dropped: dict[int, str] | None = None) -> None:
        self.texts = texts
        self.dropped = dropped or {}
        super().__init__(self)

    @abstractmethod
    def read(self, line: int, epoch: int) -> Sample:
        """What this part adds to the sample of a line, in a given epoch."""

    @abstractmethod
    def stack(self, samples: Sequence[Sample]) -> Batch:
        """What this part adds to the batch of some samples."""

    @abstractmethod
    def show(self, line: int) -> dict[str, Any]:
        """What this part adds to the description of a sample."""

    def finish(self, batch: Batch) -> Batch:
        """What this part does to a batch on the device."""
        return batch

    def properties(self) -> dict[str, Any]:
        """The fields of `DataSpec` that this part determines."""
        return {}

    def tolerates(self, error: Exception) -> bool:
        """Whether a sample of which this part raised `error` is left out."""
        return False
