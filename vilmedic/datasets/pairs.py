"""Samples of several parts: images with reports, with labels, or with both, in files or shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch

from vilmedic.config.types import Between
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


class ImSeqLabel(ImSeq):
    """Images, their reports and their labels.

    Args:
        image: the images.
        seq: the reports.
        label: the labels.
    """

    def __init__(self, *, image: ImageDataset, seq: TextDataset, label: LabelDataset) -> None:
        image.keep_sides()
        self.seq = seq
        AlignedDataset.__init__(self, image, seq, label)


class ImLabel(AlignedDataset):
    """Images and their labels.

    Args:
        image: the images.
        label: the labels.
    """

    def __init__(self, *, image: ImageDataset, label: LabelDataset) -> None:
        super().__init__(image, label)


class ImSeqShards(ImSeq):
    """Images in tar shards and their reports, read a few shards at a time.

    The samples are those of `ImSeq` on the folder that the shards were made from; the random order
    of training is another one, which stays within some shards before it goes on to the next.

    Args:
        image: the images; their root holds line files and an index of shards.
        seq: the reports.
        label: the labels, where there are some.
        mixed: shards whose samples are mixed at a time; from a URL, about as many are held.
    """

    def __init__(
        self,
        *,
        image: ImageDataset,
        seq: TextDataset,
        label: LabelDataset | None = None,
        mixed: Annotated[int, Between(1, 65536)] = 16,
    ) -> None:
        from vilmedic.datasets.shards import PictureShards  # other data sets have no use for it

        pictures = getattr(image.pictures, "source", image.pictures)
        if not isinstance(pictures, PictureShards):
            raise ValueError(
                f"{image.texts.path.parent} holds no index of shards; data/make_shards.py makes "
                "such a folder from a folder of line files"
            )
        image.keep_sides()
        self.seq, self.mixed = seq, mixed
        self._shards = pictures.index.of_lines
        AlignedDataset.__init__(self, *(part for part in (image, seq, label) if part is not None))

    def order(self, *, seed: int, epoch: int, batch_size: int) -> torch.Tensor:
        """The order of the samples in a pass of training; see `shard_order`."""
        from vilmedic.datasets.shards import shard_order

        return shard_order(
            self._shards[self.kept],
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            mixed=self.mixed,
        )
