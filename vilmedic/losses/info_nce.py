"""The contrastive loss of CLIP, with a learned temperature (Radford et al. 2021)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from vilmedic.config.types import Temperature
from vilmedic.distributed.gather import WHOLE, Part, local
from vilmedic.errors import ArgumentError
from vilmedic.losses.convirt import convirt_loss, several_positives
from vilmedic.losses.learned import LearnedLoss


class InfoNCELoss(LearnedLoss):
    """The mean of the image-to-text and the text-to-image term, with a learned temperature.

    "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020,
    figure 3; the terms are those of `convirt_loss`, of van den Oord et al. 2018, arXiv 1807.03748.
    The logarithm of the temperature is learned, and brought back within its bounds before each
    step, as CLIP does: it never divides by less than 0.01.

    Args:
        tau: temperature to start with.
        tau_min: the lowest temperature.
        tau_max: the highest temperature.
    """

    learns: ClassVar[tuple[str, ...]] = ("temperature",)

    def __init__(
        self, *, tau: Temperature = 0.07, tau_min: Temperature = 0.01, tau_max: Temperature = 1.0
    ) -> None:
        super().__init__()
        if not tau_min <= tau <= tau_max:
            raise ArgumentError(
                {"tau": f"given {tau}. Allowed: from tau_min ({tau_min}) to tau_max ({tau_max})."}
            )
        self.bounds = (math.log(tau_min), math.log(tau_max))
        self.log_temperature = nn.Parameter(torch.tensor([math.log(tau)]))

    def learned(self) -> dict[str, Tensor]:
        """The scalar `temperature`."""
        return {"temperature": self.log_temperature.exp().sum()}

    def clamp(self) -> None:
        """Bring the temperature back within its bounds, in place."""
        local(self.log_temperature.data).clamp_(*self.bounds)

    def forward(
        self,
        visual: Tensor,
        linguistic: Tensor,
        part: Part = WHOLE,
        temperature: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its two terms.

        Args:
            visual: embeddings of the images, [B, D], of any length.
            linguistic: embeddings of the reports, or of other views of the images, [B, D].
            part: see `convirt_loss`.
            temperature: what `learned` gave.
            targets: see `convirt_loss`.

        Returns:
            Scalars `loss`, and without gradient `image_to_text` and `text_to_image`, and with
            targets what `several_positives` gives.

        Raises:
            ValueError: if the shapes differ, or the batch holds fewer than two pairs.
        """
        tau = self.learned()["temperature"] if temperature is None else temperature
        loss, image_to_text, text_to_image = convirt_loss(
            visual, linguistic, tau, 0.5, part, targets
        )
        return {
            "loss": loss,
            "image_to_text": image_to_text.detach(),
            "text_to_image": text_to_image.detach(),
            **several_positives(targets, part),
        }

    def extra_repr(self) -> str:
        """The bounds, as `print(model)` shows them."""
        low, high = (math.exp(bound) for bound in self.bounds)
        return f"tau_min={low:.4g}, tau_max={high:.4g}"
