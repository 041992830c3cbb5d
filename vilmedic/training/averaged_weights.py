"""Exponential moving average of the weights (`trainor.ema`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vilmedic.distributed.gather import like, local


class AveragedWeights:
    """Exponential moving average of weights and running statistics.

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
            taken: whether the last step was taken, bool scalar; otherwise the average stays.
        """
        move = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = [(local(self._average[k]), local(v)) for k, v in self._tensors().items()]
        counts = [pair for pair in pairs if not pair[1].is_floating_point()]
        if counts:
            torch._foreach_copy_([one for one, _ in counts], [value for _, value in counts])
        by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            if pair[1].is_floating_point():
                by_type.setdefault(pair[1].dtype, []).append(pair)
        for kind, some in by_type.items():
            averages, values = [one for one, _ in some], [value for _, value in some]
            share = (taken * move).to(kind)
            if share.device.type == "cpu":
                torch._foreach_lerp_(averages, values, [share] * len(values))
            else:
                move_towards(averages, values, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the averages as the model's weights, and restore the weights exactly afterwards."""
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

    def has_frozen_weights(self) -> bool:
        """Whether the averages of weights that are not trained are these weights.

        Those of a run that trained them before come close to them only in time.
        """
        return all(
            torch.equal(local(self._average[name]), local(value.detach()))
            for name, value in self._tensors().items()
            if isinstance(value, nn.Parameter) and not value.requires_grad
        )

    def buffers(self) -> list[Tensor]:
        """The averages of buffers, such as running statistics."""
        return [
            self._average[name]
            for name, value in self._tensors().items()
            if not isinstance(value, nn.Parameter)
        ]

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


@torch.no_grad()
def move_towards(averages: list[Tensor], values: list[Tensor], share: Tensor) -> None:
    """Move tensors by a share of their way, in a few kernels of a GPU.

    Torch interpolates by a number of the device in a kernel for each tensor.

    Args:
        averages: what is moved.
        values: where to, of the same dtype.
        share: from 0 to 1, a scalar of that dtype.
    """
    steps = list(torch._foreach_sub(values, averages))
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(averages, steps)
