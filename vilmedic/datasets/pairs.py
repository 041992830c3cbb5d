"""Samples of several parts: images with reports, with labels, or with both."""

from __future__ import annotations

from collections.abc import Sequence

from vilmedic.datasets.aligned import AlignedDataset, Batch
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.label import LabelDataset
from vilmedic.datasets.text import TextDataset


class ImSeq(AlignedDataset):
    """Images and their reports.

    Args:
        image: the images.
        seq: the reports.
    """

    def __init__(self, *, image: ImageDataset, seq: TextDataset) -> None:
        image.keep_sides()
        self.seq = seq
        super().__init__(image, seq)

    def encode_text(self, reports: Sequence[str]) -> Batch:
        """Ids of any reports, such as prompts; see `ReportTokens.encode`."""
        return self.seq.encode_text(reports)

    def words(self, report: str) -> list[str]:
        """The words of any report; see `ReportTokens.words`."""
        return self.seq.words(report)


class ImSeqLabel(AlignedDataset):
    """Images, their reports and their labels.

    Args:
        image: the images.
        seq: the reports.
        label: the labels.
    """

    def __init__(self, *, image: ImageDataset, seq: TextDataset, label: LabelDataset) -> None:
        image.keep_sides()
        self.seq = seq
        super().__init__(image, seq, label)

    def encode_text(self, reports: Sequence[str]) -> Batch:
        """Ids of any reports, such as prompts; see `ReportTokens.encode`."""
        return self.seq.encode_text(reports)

    def words(self, report: str) -> list[str]:
        """The words of any report; see `ReportTokens.words`."""
        return self.seq.words(report)


class ImLabel(AlignedDataset):
    """Images and their labels.

    Args:
        image: the images.
        label: the labels.
    """

    def __init__(self, *, image: ImageDataset, label: LabelDataset) -> None:
        super().__init__(image, label)
