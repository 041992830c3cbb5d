"""What a trained model is measured against."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

SIDE = 32


class RawPixels(nn.Module):
    """The image itself as a feature: what can be read off without any learning.

    `visual_backbone` is the grey image, averaged down to 32 x 32 pixels, flattened and
    standardised (mean 0, variance 1) for each image: [B, 1024]. Of several images or views of a
    sample it takes the first. There are no texts, so metrics that need them are null.
    """

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`visual_backbone` of a prepared batch; nothing when it has no images."""
        if "images" not in batch:
            logger.warning("raw_pixels: the data has no images, so this baseline is null.")
            return {}
        images = batch["images"].float()
        if images.ndim == 5:
            images = images[:, 0]
        grey = functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), SIDE).flatten(1)
        spread, mean = torch.std_mean(grey, dim=1, keepdim=True)
        return {"visual_backbone": (grey - mean) / spread.clamp(min=1e-6)}
