"""Base class of data sets whose samples are aligned lines of several files.

All random draws for a sample are a function of the run's seed, the epoch and the sample's line, so
that neither the number of workers nor a restart changes the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vilmedic.datasets.lines import Lines, check_aligned, listed
from vilmedic.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Batch = dict[str, Any]
SPECIAL = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")  # roles of a tokenizer's words
IMAGE_TOKENS = "image_tokens"  # of a frozen VAE, int64 [B, N]
IMAGE_FEATURES, REPORT_FEATURES = "image_features", "report_features"
"""Keys of a batch: precomputed features of frozen image and text encoders, [B, F]."""
TOKEN_HASH = "token_hash"
"""Key of a batch without tokens: a hash of the tokens of each report, int64 [B]."""
REPORT_HASH = "report_hash"
"""Key of a batch: a hash of each report, int64 [B]."""
TOLERATED = 0.01  # largest share of bad samples that `on_error: skip` leaves out


@dataclass(frozen=True)
class SampleKey:
    """Key of a sample: its position in the data set and the epoch.

    Args:
        index: position in the data set, from 0 to `len(dataset) - 1`.
        epoch: the pass over the data, from 0.
    """

    index: int
    epoch: int = 0


@dataclass(frozen=True)
class DataSpec:
    """The properties of a data set that shape a model.

    Args:
        tokenizer: turns reports into ids; None when the data set has no text.
        tokenizer_max_len: largest number of ids of a report, special tokens included.
        labels: the class names in the order of the label columns; empty when there are none.
        multi_label: whether a sample may have several labels.
        positives: how many samples have each label; not part of a checkpoint.
        negatives: how many are known not to have it.
        filler: the padding word of reports, for models that give every text position a token;
            usually None: models then mark the positions behind the end of a report themselves.
        normalization: mean and standard deviation by which the colour channels are normalised
            after scaling to 0..1; None if the data set has no images.
    """

    tokenizer: PreTrainedTokenizerFast | None = None
    tokenizer_max_len: int | None = None
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    positives: tuple[int, ...] = ()
    negatives: tuple[int, ...] = ()
    filler: int | None = None
    normalization: tuple[list[float], list[float]] | None = None

    @property
    def vocab_size(self) -> int | None:
        """Largest id of the tokenizer plus one: ids may have gaps."""
        return None if self.tokenizer is None else max(self.tokenizer.get_vocab().values()) + 1

    def to_plain(self) -> dict[str, Any]:
        """The properties as plain values, which a checkpoint can hold; see `from_plain`."""
        return {
            "tokenizer": None if self.tokenizer is None else plain_tokenizer(self.tokenizer),
            "tokenizer_max_len": self.tokenizer_max_len,
            "labels": list(self.labels),
            "multi_label": self.multi_label,
            "filler": self.filler,
            "normalization": None if self.normalization is None else list(self.normalization),
        }

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> DataSpec:
        """The properties that `to_plain` gave.

        Raises:
            ValueError, KeyError, TypeError: they are damaged.
        """
        normalization = saved["normalization"]
        tokenizer = None if saved["tokenizer"] is None else _tokenizer(saved["tokenizer"])
        if tokenizer is not None:
            if not _is_count(saved["tokenizer_max_len"]):
                raise ValueError(f"tokenizer_max_len is {saved['tokenizer_max_len']!r}")
            if not (saved["filler"] is None or saved["filler"] in tokenizer.get_vocab().values()):
                raise ValueError(f"filler is {saved['filler']!r}, which is no word")
        if not all(isinstance(label, str) for label in saved["labels"]):
            raise ValueError("a label is no text")
        return cls(
            tokenizer=tokenizer,
            tokenizer_max_len=saved["tokenizer_max_len"],
            labels=tuple(saved["labels"]),
            multi_label=bool(saved["multi_label"]),
            filler=saved["filler"],
            normalization=None if normalization is None else (normalization[0], normalization[1]),
        )

    def check_pixels(self, model: str) -> None:
        """Refuse normalised images, for a model that takes pixels in 0..1.

        Args:
            model: its name, for the message.

        Raises:
            ConfigError: the data set normalises its images.
        """
        if self.normalization is None:
            return
        mean, std = self.normalization
        if any(mean) or set(std) != {1}:
            raise ConfigError(
                f"mean and std of the images: given {mean} and {std}, but {model} takes pixels in "
                "0..1 and normalises them itself. Set mean=[0] and std=[1] where the data set says "
                "how images are read."
            )


class AlignedDataset(Dataset[Sample]):
    """Data set whose samples combine the same lines of one or several parts.

    Args:
        parts: the parts of a sample; messages name lines of the first one's file.

    Raises:
        DataError: the files of the parts have different numbers of lines, or more samples than
            tolerated are left out.
    """

    def __init__(self, *parts: AlignedPart) -> None:
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
        """Return a sample by its key, or by its number in epoch 0.

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
        """Return the order of the samples in a training epoch, if this data set defines one.

        Args:
            seed: seed of the order.
            epoch: the pass over the data.
            batch_size: samples per batch.

        Returns:
            int64 [len(self)], each sample once; None when any random order will do.
        """
        return None

    def prepare(self, batch: Batch) -> Batch:
        """Run the batched processing on the device of the batch."""
        for part in self.parts:
            batch = part.finish(batch)
        return batch

    @property
    def spec(self) -> DataSpec:
        """Return the data properties that a model needs."""
        known = {name: value for part in self.parts for name, value in part.properties().items()}
        for part in self.parts:
            known |= part.counted(self.kept)
        return dataclasses.replace(DataSpec(), **known)

    def describe(self, index: int) -> dict[str, Any]:
        """Describe a sample for people: `image` (paths), `report`, `labels` (names)."""
        line = int(self.kept[index])
        return {name: value for part in self.parts for name, value in part.show(line).items()}

    def lines(self, indices: Iterable[int] | torch.Tensor) -> list[str]:
        """`file:line` of samples, given by their positions in the data set."""
        return [self.parts[0].texts.where(int(self.kept[int(index)])) for index in indices]

    def tolerates(self, error: Exception) -> bool:
        """Return whether a sample that raised `error` is left out instead of ending the run."""
        return any(part.tolerates(error) for part in self.parts)

    def skip(self, reasons: dict[int, str]) -> None:
        """Record lines that are left out, each with the reason.

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
        """Log the samples left out since the last report."""
        new = list(self.skipped.values())[self._reported :]
        if new:
            logger.warning(
                "Left out %s (%d of %d so far)",
                listed(new, "bad sample"),
                len(self.skipped),
                len(self.parts[0].texts),
            )
        self._reported = len(self.skipped)


class AlignedPart(AlignedDataset):
    """Data set of one file, which can also be a part of another data set.

    Args:
        texts: the lines of its file.
        dropped: lines that cannot be used, with the reason; left out of every sample.

    Attributes:
        split: name of the split.
        rows: precomputed outputs of a frozen network: their name in a batch, and a function that
            returns the row of a line, None for an undecodable image. See `token_file`.
        tried: whether precomputing was tried, with or without success.
    """

    features: ClassVar[str] = ""
    """Batch key of the features of a frozen encoder of this part."""
    fixed_by: ClassVar[str] = ""
    """The options with which a line is the same in every epoch."""
    split: str = ""
    rows: tuple[str, Callable[[int], torch.Tensor | None]] | None = None
    tried: bool = False

    def __init__(self, texts: Lines, dropped: dict[int, str] | None = None) -> None:
        self.texts = texts
        self.dropped = dropped or {}
        super().__init__(self)

    @abstractmethod
    def read(self, line: int, epoch: int) -> Sample:
        """Read this part of the sample of a line, in a given epoch."""

    @abstractmethod
    def stack(self, samples: Sequence[Sample]) -> Batch:
        """Collate this part of some samples."""

    @abstractmethod
    def show(self, line: int) -> dict[str, Any]:
        """Return this part's entries in the description of a sample."""

    @property
    def fixed(self) -> bool:
        """Whether what this part adds to the sample of a line is the same in every epoch."""
        return False

    def content(self, lines: NDArray[np.int64], folder: Path) -> list[Any]:
        """Return plain values that identify the content of this part for some lines.

        Args:
            lines: numbers of the lines.
            folder: folder for a cache that speeds up later calls.
        """
        raise NotImplementedError

    def leave_out_tokens(self, lines: NDArray[np.int64]) -> None:
        """Give `rows` without the tokens of reports, for a model that does not read tokens.

        Args:
            lines: numbers of the lines of the samples, in order.
        """

    def finish(self, batch: Batch) -> Batch:
        """Process a batch on the device."""
        return batch

    def properties(self) -> dict[str, Any]:
        """The fields of `DataSpec` that this part determines."""
        return {}

    def counted(self, lines: NDArray[np.int64]) -> dict[str, Any]:
        """The fields of `DataSpec` that depend on which lines are used."""
        return {}

    def tolerates(self, error: Exception) -> bool:
        """Return whether a sample is left out after this part raised `error`."""
        return False


def stable_seed(purpose: str, *numbers: int) -> int:
    """A 64-bit seed that is the same on every machine and in every process.

    Args:
        purpose: the use of the draw (`image`, `shuffle`), so that uses have different numbers.
        numbers: values that the draw depends on: seed, epoch, line, view.
    """
    text = ":".join([purpose, *(str(number) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within a block, and restore the caller's state afterwards.

    `torch.manual_seed` would also reseed the accelerators, which the training loop is using.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def same_tokenizer(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Return whether two tokenizers turn every text into the same numbers."""
    return bool(plain_tokenizer(one)["json"] == plain_tokenizer(other)["json"])


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The file `tokenizer.json` of a tokenizer, and which of its words are special."""
    special = {f"{name}_token": getattr(tokenizer, f"{name}_token", None) for name in SPECIAL}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Each call sets truncation and padding, and the tokenizer keeps those of the last call.
    content |= {"truncation": None, "padding": None}
    return {
        "json": json.dumps(content, ensure_ascii=False),
        "special": {name: str(word) for name, word in special.items() if word is not None},
    }


def _tokenizer(saved: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_str(saved["json"])
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(f"its tokenizer is damaged: {error}") from None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **saved["special"])
    if tokenizer.pad_token_id is None:
        raise ValueError("its tokenizer has no padding token")
    return tokenizer


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
