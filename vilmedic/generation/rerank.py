"""How well images agree with a report, as a trained ConVIRT sees it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.device import move
from vilmedic.errors import ConfigError
from vilmedic.evaluation.from_checkpoint import from_checkpoint
from vilmedic.models.convirt import ConVIRT

KEY = "ensemblor.rerank.ckpt"


class Reranker:
    """Scores images by the cosine similarity of their embedding and that of the report.

    The model, its tokenizer and the preparation of its images are those of the run that wrote the
    checkpoint; the data of that run are not needed.

    Args:
        ckpt: path of the checkpoint.
        device: where to compute.

    Raises:
        ConfigError: the checkpoint is not one of ConVIRT.
        CheckpointError: it is missing, damaged or does not say how it was made.
    """

    def __init__(self, ckpt: str, device: torch.device) -> None:
        found = from_checkpoint(Path(ckpt))
        if not isinstance(found.model, ConVIRT):
            kind = type(found.model).__name__
            raise ConfigError(f"{KEY}: {ckpt} is a checkpoint of {kind}; allowed: ConVIRT.")
        if found.reports is None or found.pixels is None:
            raise ConfigError(f"{KEY}: {ckpt} was not trained on images and reports.")
        self.device = device
        self.reports, self.pixels = found.reports, found.pixels
        self.model = found.model.to(device)

    @torch.inference_mode()
    def scores(self, report: str, images: Tensor) -> list[float]:
        """The agreement of images with a report, -1 to 1 each; the same for equal images.

        Args:
            report: the text.
            images: [B, 1 or 3, H, W] in 0..1.
        """
        batch = move(self.reports.encode([report]), self.device)
        wanted = self.model.encode_text(batch)["linguistic"]
        distinct, places = images.unique(dim=0, return_inverse=True)
        found = self.model.encode({"images": self._prepare(distinct)})["visual"]
        scores = functional.cosine_similarity(found.double(), wanted.double())
        agreement: list[float] = scores[places].tolist()
        return agreement

    def _prepare(self, images: Tensor) -> Tensor:
        pixels = (images * 255).round().to(torch.uint8)
        if self.pixels.channels == 1:
            pixels = pixels.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
        plain = torch.stack([self.pixels.plain(image) for image in pixels.cpu()])
        return self.pixels.normalized(plain.to(self.device))
