"""A data set and models small enough for instant evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vilmedic.datasets.aligned import DataSpec
from vilmedic.models.contract import Batch, ContrastiveModel, Features, Model

LABELS = ("Effusion", "Mass")


class ToyData:
    """Images of 4 x 4 pixels whose first two pixels are the labels, and reports that name them."""

    parts = ()

    def __init__(
        self,
        split: str = "test",
        size: int = 10,
        *,
        reports: bool = True,
        labels: bool = True,
        multi_label: bool = True,
    ) -> None:
        random = torch.Generator().manual_seed(len(split) + size)
        self.split, self.size = split, size
        self.targets = (torch.rand(size, 2, generator=random) > 0.5).float()
        self.images = torch.randint(0, 200, (size, 1, 4, 4), generator=random, dtype=torch.uint8)
        self.images[:, 0, 0, :2] += (50 * self.targets).to(torch.uint8)
        self.ids = torch.randint(0, 10, (size, 3), generator=random)
        self.reports, self.multi_label = reports, multi_label
        self.spec = DataSpec(labels=LABELS if labels else (), multi_label=multi_label)

    def __len__(self) -> int:
        return self.size

    def batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        for rows in torch.arange(self.size).split(batch_size):
            batch = {"index": rows, "images": self.images[rows]}
            if self.reports:
                batch["input_ids"] = self.ids[rows]
            if self.spec.labels:
                several = self.targets[rows]
                batch["labels"] = several if self.multi_label else several[:, 1].long()
            yield batch

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = batch["images"].float().div(255).expand(-1, 3, -1, -1)
        return {**batch, "images": images}

    def lines(self, index: Iterable[int]) -> list[str]:
        return [f"data/{self.split}.image.tok:{int(i) + 1}" for i in index]

    def describe(self, index: int) -> dict[str, Any]:
        return {"image": [f"{index}.png"], "labels": []}

    def encode_text(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[len(text) % 10] * 3 for text in texts])}


class ToyModel(ContrastiveModel):
    """Linear maps of pixels and of mean token embeddings; the loss is the sum of distances."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.image = nn.Linear(48, width)
        self.text = nn.Embedding(10, width)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(width).eval()
        self.temperature = nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def encode(self, batch: Batch) -> Features:
        self.seen.append(len(batch["images"]))
        backbone = self.dropout(batch["images"].flatten(1))
        features = {"visual": self.image(backbone), "temperature": self.temperature}
        if not self.training:
            features["visual_backbone"] = backbone
        features["map"] = backbone[:, None] * torch.ones(2, 1)
        return features | (self.encode_text(batch) if "input_ids" in batch else {})

    def encode_text(self, batch: Batch) -> Features:
        return {"linguistic": self.text(batch["input_ids"]).mean(dim=1)}

    def contrast(self, features: Features) -> dict[str, Tensor]:
        assert len(features["visual"]) > 1
        assert features["visual"].dtype == torch.float32
        distance = (features["visual"] - features["linguistic"].roll(1, 0)).square().sum(dim=1)
        return {"loss": distance.mean()}


class ToyAutoencoder(Model):
    """A model whose loss has no interaction between samples."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["images"]
        return {
            "loss": images.mean(),
            "part": images.mean(),
            "code": images.flatten(1)[:, :4],
            "reconstruction": images,
        }
