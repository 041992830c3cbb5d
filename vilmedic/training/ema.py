"""An averaged copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vilmedic.training.parallel import like, local


class AveragedWeights:
    """The exponential moving average of weights and running statistics.

    After step t the average moves by 1 - min(decay, (1 + t) / (10 + t)) towards the weights, so
    that the start of training is soon forgotten.

    Args:
        model: whose weights are averaged; its device and its values now are where it starts.
        decay: share of the average that stays, from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._average = {name: value.detach().clone() for name, value in self._tensors().items()}

    @torch.no_grad()
    def update(self, step: int, taken: Tensor) -> None:
        """Move towards the weights.

        Args:
            step: steps of the run so far.
            taken: whether the last one was taken, bool scalar; the average waits otherwise.
        """
        move = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in self._tensors().items():
            average, value = local(self._average[name]), local(value)
            if value.is_floating_point():
                average.lerp_(value, (taken * move).to(value.dtype))
            else:
                average.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average as the weights of the model, and the weights back afterwards, bit by bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The average, under the names that the model's own state has."""
        first = {id(value): name for name, value in self._tensors().items()}
        state = self._model.state_dict(keep_vars=True)
        return {name: self._average[first[id(value)]] for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with the average of a checkpoint."""
        for name, value in self._average.items():
            value.copy_(like(state[name], value))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._tensors().items():
            kept = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(kept)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the model's state, those that carry several names once."""
        state = self._model.state_dict(keep_vars=True)
        once = {id(value): name for name, value in reversed(state.items())}
        return {name: state[name] for name in once.values()}
