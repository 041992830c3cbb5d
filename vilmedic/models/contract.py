"""What every model offers to the executors, and what contrastive models offer on top of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from vilmedic.errors import ConfigError

Batch = dict[str, Tensor]
Features = dict[str, Tensor]


class Model(nn.Module, ABC):
    """A system that can be trained: a batch goes in, a loss comes out.

    A model moves no tensor between devices, writes no file and sees no data loader.
    """

    cross_sample: ClassVar[bool] = False
    """Whether the loss compares the samples of a batch, so that its size changes the loss."""
    keep: ClassVar[tuple[str, ...]] = ()
    """Outputs, besides vectors of floats, that an evaluation keeps for every sample."""
    prefixes: ClassVar[tuple[str, ...]] = ("",)
    """What may stand before the names of all weights in files of older formats, if anything."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The scalar `loss` of a batch, and other scalars worth logging."""

    def schedule(self, step: int) -> dict[str, float]:
        """Set what changes as training goes on, such as a temperature.

        Called before each optimizer step, and when a checkpoint is evaluated. What is set follows
        from the step alone, so that a run that is continued does as one that never stopped.

        Args:
            step: number of the step that comes, counted from 1.

        Returns:
            Names and values for the log.
        """
        return {}


class ContrastiveModel(Model):
    """A model whose loss compares samples, split into what does and what does not.

    Args:
        forward_batch_size: largest number of samples encoded at once; None encodes the whole
            batch. Batch normalisation sees a chunk, the loss sees all of the batch.
    """

    cross_sample: ClassVar[bool] = True
    contrast_needs: ClassVar[tuple[str, ...]] = ("visual", "linguistic")
    """The features without which `contrast` is undefined; data that lacks one has no loss."""

    def __init__(self, forward_batch_size: int | None = None) -> None:
        super().__init__()
        if forward_batch_size is not None and forward_batch_size < 1:
            raise ConfigError(
                f"model.forward_batch_size must be at least 1, not {forward_batch_size}; "
                "null encodes the whole batch at once."
            )
        self.forward_batch_size = forward_batch_size

    @abstractmethod
    def encode(self, batch: Batch) -> Features:
        """Embed every sample on its own.

        Args:
            batch: the batch after the data set's `prepare`.

        Returns:
            `visual` and `linguistic`, each [B, D] and not normalised, and what else the loss
            compares, for what the batch holds;
            outside training also `visual_backbone` [B, F], the pooled features of the image
            encoder in front of the projection. Everything trainable that the loss uses is in here.
        """

    def encode_text(self, batch: Batch) -> Features:
        """The part of `encode` for reports alone, such as prompts: `linguistic` [B, D].

        A model that reads no reports gives nothing.
        """
        return {}

    @abstractmethod
    def contrast(self, features: Features) -> dict[str, Tensor]:
        """The scalar `loss` of a batch's features, and its parts: all interaction of samples."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Encode, chunk by chunk where `forward_batch_size` says so, then contrast."""
        return self.contrast(join([self.encode(chunk) for chunk in self.chunks(batch)]))

    def chunks(self, batch: Batch) -> Iterator[Batch]:
        """Split a batch into parts of nearly equal size, none above `forward_batch_size`.

        Equal parts rather than full ones and a rest: a rest of one sample has no batch statistics.
        """
        size = len(next(iter(batch.values())))
        count = math.ceil(size / self.forward_batch_size) if self.forward_batch_size else 1
        if count <= 1:
            yield batch
            return
        parts = {key: torch.tensor_split(value, count) for key, value in batch.items()}
        for i in range(count):
            yield {key: part[i] for key, part in parts.items()}


def join(chunks: list[Features]) -> Features:
    """Concatenate the features of consecutive chunks along the batch.

    A scalar, such as a learned temperature, is the same in every chunk and is kept once.
    """
    if len(chunks) == 1:
        return chunks[0]
    return {
        key: torch.cat([chunk[key] for chunk in chunks]) if value.ndim else value
        for key, value in chunks[0].items()
    }
