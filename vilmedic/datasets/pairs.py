"""Data sets of several parts: images with reports, labels, or both, in files or shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch

from vilmedic.config.types import Above, AtMost, Between, Runtime, UsedWith
from vilmedic.datasets.aligned import AlignedDataset, Batch
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.label import LabelDataset
from vilmedic.datasets.text import TextDataset

Fraction = Annotated[float, UsedWith("ids", (None,)), Above(0), AtMost(1)]
FractionSeed = Annotated[int, UsedWith("fraction"), Between(0, 4294967295)]


class Paired(AlignedDataset):
    """Data sets of which a part of the training split can be used; see `keep_subset`."""

    def _keep(
        self,
        split: str,
        training: bool,
        run_dir: Path,
        fraction: float | None,
        seed: int,
        ids: str | None,
    ) -> None:
        if fraction is None and ids is None:
            return
        from vilmedic.datasets.subset import keep_subset  # most runs use the whole split

        where = run_dir if training else None
        keep_subset(self, split=split, fraction=fraction, seed=seed, ids=ids, run_dir=where)


class ImSeq(Paired):
    """Images and their reports.

    Args:
        image: the images.
        seq: the reports.
        fraction: share of the training split that is used, such as 0.01: stratified by label, whole
            patients where there is a file of them, and the smaller within the larger. The samples
            are listed in the run directory, train.ids.tok; null uses all.
        fraction_seed: which samples these are.
        ids: file with the samples of the training split to use instead, one image path per line.
    """

    def __init__(
        self,
        *,
        split: Runtime[str] = "",
        training: Runtime[bool] = False,
        run_dir: Runtime[Path] = Path(),
        image: ImageDataset,
        seq: TextDataset,
        fraction: Fraction | None = None,
        fraction_seed: FractionSeed = 0,
        ids: str | None = None,
    ) -> None:
        image.keep_sides()
        self.seq = seq
        super().__init__(image, seq)
        self._keep(split, training, run_dir, fraction, fraction_seed, ids)

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
        fraction: share of the training split that is used, such as 0.01: stratified by label, whole
            patients where there is a file of them, and the smaller within the larger. The samples
            are listed in the run directory, train.ids.tok; null uses all.
        fraction_seed: which samples these are.
        ids: file with the samples of the training split to use instead, one image path per line.
    """

    def __init__(
        self,
        *,
        split: Runtime[str] = "",
        training: Runtime[bool] = False,
        run_dir: Runtime[Path] = Path(),
        image: ImageDataset,
        seq: TextDataset,
        label: LabelDataset,
        fraction: Fraction | None = None,
        fraction_seed: FractionSeed = 0,
        ids: str | None = None,
    ) -> None:
        image.keep_sides()
        self.seq = seq
        AlignedDataset.__init__(self, image, seq, label)
        self._keep(split, training, run_dir, fraction, fraction_seed, ids)


class ImLabel(Paired):
    """Images and their labels.

    Args:
        image: the images.
        label: the labels.
        fraction: share of the training split that is used, such as 0.01: stratified by label, whole
            patients where there is a file of them, and the smaller within the larger. The samples
            are listed in the run directory, train.ids.tok; null uses all.
        fraction_seed: which samples these are.
        ids: file with the samples of the training split to use instead, one image path per line.
    """

    def __init__(
        self,
        *,
        split: Runtime[str] = "",
        training: Runtime[bool] = False,
        run_dir: Runtime[Path] = Path(),
        image: ImageDataset,
        label: LabelDataset,
        fraction: Fraction | None = None,
        fraction_seed: FractionSeed = 0,
        ids: str | None = None,
    ) -> None:
        super().__init__(image, label)
        self._keep(split, training, run_dir, fraction, fraction_seed, ids)


class ImSeqShards(ImSeq):
    """Images in tar shards and their reports, read a few shards at a time.

    The samples are those of `ImSeq` on the folder that the shards were made from; the shuffled
    order differs: it stays within a few shards before moving on.

    Args:
        image: the images; their root holds line files and an index of shards.
        seq: the reports.
        label: the labels, where there are some.
        mixed: shards whose samples are mixed at a time; from a URL, about as many are held.
        fraction: share of the training split that is used, such as 0.01: stratified by label, whole
            patients where there is a file of them, and the smaller within the larger. The samples
            are listed in the run directory, train.ids.tok; null uses all.
        fraction_seed: which samples these are.
        ids: file with the samples of the training split to use instead, one image path per line.
    """

    def __init__(
        self,
        *,
        split: Runtime[str] = "",
        training: Runtime[bool] = False,
        run_dir: Runtime[Path] = Path(),
        image: ImageDataset,
        seq: TextDataset,
        label: LabelDataset | None = None,
        mixed: Annotated[int, Between(1, 65536)] = 16,
        fraction: Fraction | None = None,
        fraction_seed: FractionSeed = 0,
        ids: str | None = None,
    ) -> None:
        from vilmedic.datasets.shards import ImageShards  # other data sets have no use for it

        source = getattr(image.source, "source", image.source)
        if not isinstance(source, ImageShards):
            raise ValueError(
                f"{image.texts.path.parent} holds no index of shards; data/make_shards.py makes "
                "such a folder from a folder of line files"
            )
        image.keep_sides()
        self.seq, self.mixed = seq, mixed
        self._shards = source.index.of_lines
        AlignedDataset.__init__(self, *(part for part in (image, seq, label) if part is not None))
        self._keep(split, training, run_dir, fraction, fraction_seed, ids)

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
