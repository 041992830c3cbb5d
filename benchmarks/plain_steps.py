"""Training steps as plain loops, for comparison: they use no code of this package.

Networks of torchvision and transformers, the loss as in its paper, autocast and AdamW. The VAE and
DALLE are those of dalle-pytorch. GLoRIA's local loss loops over the reports, as the published code
does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from transformers import BertConfig, BertModel

from benchmarks.published_systems import Batch, Lacking, Sizes
from tests.losses.reference import local_loss_report_by_report
from tests.parity.reference import load_reference, missing_packages

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = {"bf16": torch.bfloat16}


def plain_step(
    name: str, sizes: Sizes, device: torch.device, precision: str
) -> Callable[[Batch], Tensor]:
    """The training step of a system; it returns the loss.

    Args:
        name: the system.
        sizes: the same as for our step.
        device: where to compute.
        precision: `fp32` or `bf16`.

    Raises:
        Lacking: dalle-pytorch is not installed.
    """
    if name in ("VAE", "DALLE") and (missing := missing_packages()):
        raise Lacking(f"{', '.join(missing)}: not installed")
    torch.manual_seed(0)
    makers: dict[str, Callable[[Sizes], nn.Module]] = {
        "ConVIRT": _ClipStyle,
        "SimCLR": _TwoViews,
        "GLoRIA": _ReportByReport,
        "VAE": _PeerVAE,
        "DALLE": _PeerDALLE,
    }
    model = makers[name](sizes).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(batch: Batch) -> Tensor:
        lengths = (batch["word_ids"].amax(1) + 1).tolist() if "word_ids" in batch else []
        batch = {
            key: value.to(device, non_blocking=True)
            for key, value in batch.items()
            if isinstance(value, Tensor)
        }
        optimizer.zero_grad(set_to_none=True)
        half = HALF.get(precision)
        with torch.autocast(device.type, dtype=half) if half else nullcontext():
            loss: Tensor = model(batch, lengths)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _head(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, outside), nn.ReLU(), nn.Linear(outside, outside))


class _Images(nn.Module):
    """Image encoder: normalises grey uint8 images and encodes them."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.network: Any = models.get_model(backbone, weights=None)
        self.width = self.network.fc.in_features
        self.network.fc = nn.Identity()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def pixels(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(self.pixels(images))
        return features


class _ClipStyle(nn.Module):
    """ConVIRT: image and report encoder, two heads, cross-entropy of cosines in both directions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.images = _Images(sizes.backbone)
        self.bert = BertModel(BertConfig(**sizes.bert))
        self.visual = _head(self.images.width, sizes.width)
        self.linguistic = _head(sizes.width, sizes.width)

    def forward(self, batch: Batch, lengths: list[int]) -> Tensor:
        images = self.visual(self.images(batch["images"]))
        words = self.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        reports = self.linguistic(words.pooler_output)
        images, reports = (functional.normalize(f.float(), dim=1) for f in (images, reports))
        logits = images @ reports.T / 0.1
        target = torch.arange(len(logits), device=logits.device)
        return 0.75 * functional.cross_entropy(logits, target) + 0.25 * functional.cross_entropy(
            logits.T, target
        )


class _TwoViews(nn.Module):
    """SimCLR: both views through one encoder and head, then NT-Xent."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.images = _Images(sizes.backbone)
        self.head = _head(self.images.width, sizes.width)

    def forward(self, batch: Batch, lengths: list[int]) -> Tensor:
        views = batch["images"]
        size = len(views)
        both = torch.cat((views[:, 0], views[:, 1]))
        features = functional.normalize(self.head(self.images(both)).float(), dim=1)
        logits = features @ features.T / 0.5
        own = torch.eye(2 * size, dtype=torch.bool, device=logits.device)
        target = torch.arange(2 * size, device=logits.device).roll(size)
        return functional.cross_entropy(logits.masked_fill(own, -torch.inf), target)


class _ReportByReport(nn.Module):
    """GLoRIA: global and local terms, the local terms in a loop over the reports."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.images = _Images(sizes.regions_backbone)
        self.bert = BertModel(BertConfig(**sizes.bert), add_pooling_layer=False)
        regions = self.images.network.layer4[0].conv1.in_channels
        self.to_global = nn.Linear(self.images.width, sizes.width)
        self.to_local = nn.Conv2d(regions, sizes.width, 1, bias=False)

    def forward(self, batch: Batch, lengths: list[int]) -> Tensor:
        images, net = self.images.pixels(batch["images"]), self.images.network
        if self.sizes.upsample is not None:
            side = (self.sizes.upsample, self.sizes.upsample)
            images = functional.interpolate(images, side, mode="bilinear", align_corners=True)
        stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        regions = net.layer3(net.layer2(net.layer1(stem)))
        visual = self.to_global(net.avgpool(net.layer4(regions)).flatten(1))
        regions = self.to_local(regions)
        output = self.bert(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )
        pieces = torch.stack(output.hidden_states[-self.sizes.last_layers :]).sum(0).float()
        places = batch["word_ids"].clamp(min=0)
        there = (batch["word_ids"] >= 0).unsqueeze(2)
        words = torch.zeros_like(pieces).scatter_add(
            1, places.unsqueeze(2).expand_as(pieces), pieces * there
        )
        mask = torch.arange(words.shape[1], device=words.device) < torch.tensor(
            lengths, device=words.device
        ).unsqueeze(1)
        reports = (words * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        with torch.autocast(words.device.type, enabled=False):
            local = local_loss_report_by_report(regions.float(), words, lengths)
            cosine = functional.normalize(visual.float(), dim=1) @ functional.normalize(reports).T
        target = torch.arange(len(cosine), device=cosine.device)
        both = functional.cross_entropy(10 * cosine, target)
        return local + both + functional.cross_entropy(10 * cosine.T, target)


class _PeerVAE(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.network = load_reference().DiscreteVAE(**sizes.vae)

    def forward(self, batch: Batch, lengths: list[int]) -> Tensor:
        images = batch["images"].float() / 255
        loss: Tensor = self.network(images.expand(-1, 3, -1, -1), return_loss=True)
        return loss


class _PeerDALLE(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        reference = load_reference()
        vae = reference.DiscreteVAE(**sizes.vae).requires_grad_(False)
        self.network = reference.DALLE(vae=vae, **sizes.dalle)

    def forward(self, batch: Batch, lengths: list[int]) -> Tensor:
        longest = self.network.text_seq_len
        text = functional.pad(batch["input_ids"], (0, longest - batch["input_ids"].shape[1]))
        loss: Tensor = self.network(text, batch["image_tokens"], return_loss=True)
        return loss
