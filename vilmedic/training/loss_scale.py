"""The factor that keeps small gradients of a float16 forward pass above zero."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16
STEPS_TO_GROW = 2000


class LossScale:
    """Multiplies the loss before the backward pass; the gradient is divided by it afterwards.

    Halved whenever the gradient overflows, doubled after 2000 steps without that, and never below
    1 (Micikevicius et al. 2018, arXiv 1710.03740). Always a power of two, so that scaling rounds
    nothing. It lives on the device: nothing here waits for it.

    Args:
        precision: anything but `fp16` leaves the loss as it is.
        device: where the loss is.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.used = precision == "fp16"
        self.value = torch.full((), FIRST_SCALE if self.used else 1.0, device=device)
        self._good = torch.zeros((), device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.value if self.used else loss

    def can_shrink(self) -> Tensor:
        """Whether a gradient that is not a number may be the fault of the scale: bool scalar."""
        return self.value > 1

    def update(self, finite: Tensor) -> None:
        """Adapt the scale to what a step gave.

        Args:
            finite: whether loss and gradient were numbers, bool scalar.
        """
        if not self.used:
            return
        self._good = (self._good + 1) * finite
        grow = self._good >= STEPS_TO_GROW
        grown = torch.where(grow, self.value * 2, self.value)
        self.value = torch.where(finite, grown, self.value / 2).clamp(min=1.0)
        self._good = self._good * ~grow

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value.item(), "good": self._good.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the scale of a run of the same precision."""
        self.value.fill_(state["value"])
        self._good.fill_(state["good"])
