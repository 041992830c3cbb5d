"""Base class of losses with learned parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class LearnedLoss(nn.Module, ABC):
    """A loss with weights of its own, such as a temperature.

    A model takes them from `learned` where it encodes and hands them back to `forward` by the same
    names, so that encoding in chunks, data parallel and sharded training treat them as all weights.
    `forward` takes its own where it is given none. Each weight is a vector of one number, because a
    number without a dimension cannot be sharded.
    """

    learns: ClassVar[tuple[str, ...]]
    """The names of what `learned` gives, which are arguments of `forward`."""

    @abstractmethod
    def learned(self) -> dict[str, Tensor]:
        """What the loss learns, scalars with their gradient.

        They share no memory with a weight (`weight.sum()`, not `weight[0]`): a sharded model frees
        its weights before they are used.
        """

    def clamp(self) -> None:
        """Bring the weights back within their bounds, in place; called before each step."""
