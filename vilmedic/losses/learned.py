"""Base class of losses with learned parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class LearnedLoss(nn.Module, ABC):
    """A loss with learned weights, such as a temperature.

    A model reads them by `learned` when it encodes and passes them to `forward` by the same names,
    so that chunked encoding, data-parallel and sharded training treat them like other weights.
    Without them `forward` uses its own. Each weight is a vector of one number, because a scalar
    cannot be sharded.
    """

    learns: ClassVar[tuple[str, ...]]
    """Names of the results of `learned`, which are arguments of `forward`."""

    @abstractmethod
    def learned(self) -> dict[str, Tensor]:
        """Return the learned parameters as scalars with their gradient.

        They must not share memory with a weight (`weight.sum()`, not `weight[0]`): a sharded model
        frees its weights before they are used.
        """

    def clamp(self) -> None:
        """Bring the weights back within their bounds, in place; called before each step."""
