"""The five systems at their published sizes, or tiny, with batches as the loader returns them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.small_models import tiny_spec
from vilmedic.blocks.projection import PairedProjection, VisualEmbedder, VisualProjection
from vilmedic.blocks.text import TextEncoder, WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.sections import TrainorSection
from vilmedic.datasets.aligned import SampleKey
from vilmedic.datasets.image import ImageDataset
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.dalle import DALLE
from vilmedic.models.dalle_settings import FrozenVAE, TransformerSettings
from vilmedic.models.gloria import GLoRIA
from vilmedic.models.simclr import SimCLR
from vilmedic.models.vae import VAE
from vilmedic.phantom.write import Plan, build
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.parallel import prepare_network
from vilmedic.training.step import StepResult, TrainingStep

SYSTEMS = ("ConVIRT", "SimCLR", "GLoRIA", "VAE", "DALLE")
CONTRASTIVE = ("ConVIRT", "SimCLR", "GLoRIA")
PUBLISHED_OPTIMIZER = {
    "ConVIRT": "RAdam",
    "SimCLR": "RAdam",
    "GLoRIA": "Adam",
    "VAE": "RAdam",
    "DALLE": "RAdam",
}
BATCH = {"ConVIRT": 32, "SimCLR": 16, "GLoRIA": 48, "VAE": 16, "DALLE": 12}
"""Batch sizes of config/SELFSUP and config/CLIP, with the commands in docs."""
LARGE = {"ConVIRT": 256, "SimCLR": 128, "VAE": 64, "DALLE": 48}
"""Batch sizes of the second measurement."""
Batch = dict[str, Tensor]
Prepare = Callable[[dict[str, Any]], dict[str, Any]]


class Lacking(Exception):
    """A measurement needs something that this version or machine does not have."""


@dataclass(frozen=True)
class Sizes:
    """Settings that determine the time of a step.

    Args:
        pixels: side of the images of the contrastive systems.
        file_pixels: side of the image files.
        files: number of image files.
        repeated: how often an epoch reads each file.
        backbone: image encoder.
        regions_backbone: image encoder of GLoRIA, a residual network.
        upsample: side to which GLoRIA enlarges its images.
        width: hidden size of BERT.
        layers: layers of BERT.
        vocabulary: vocabulary size of BERT.
        tokens: length of the longest report.
        last_layers: number of last BERT layers that GLoRIA sums.
        batch: samples per step, by system.
        large: samples per step of a second measurement, by system.
        vae: shape of the VAE.
        dalle: shape of DALLE.
    """

    pixels: int = 224
    file_pixels: int = 512
    files: int = 128
    repeated: int = 8
    backbone: str = "resnet50"
    regions_backbone: str = "resnet50"
    upsample: int | None = 299
    width: int = 768
    layers: int = 12
    vocabulary: int = 50_265
    tokens: int = 128
    last_layers: int = 4
    batch: dict[str, int] = field(default_factory=lambda: BATCH)
    large: dict[str, int] = field(default_factory=lambda: LARGE)
    vae: dict[str, Any] = field(
        default_factory=lambda: {
            "image_size": 256,
            "num_tokens": 8192,
            "codebook_dim": 1024,
            "num_layers": 3,
            "num_resnet_blocks": 1,
            "hidden_dim": 64,
        }
    )
    dalle: dict[str, Any] = field(
        default_factory=lambda: {
            "dim": 1024,
            "depth": 16,
            "heads": 16,
            "dim_head": 64,
            "text_seq_len": 100,
            "num_text_tokens": 5000,
            "attn_dropout": 0.1,
            "ff_dropout": 0.1,
        }
    )

    @property
    def bert(self) -> dict[str, Any]:
        """Configuration of BERT."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.width // 64),
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": 514,
            "vocab_size": self.vocabulary,
        }

    @property
    def image_tokens(self) -> int:
        """Number of image tokens of DALLE."""
        return int(self.vae["image_size"] // 2 ** self.vae["num_layers"]) ** 2


PUBLISHED = Sizes()
TINY = Sizes(
    pixels=32,
    file_pixels=64,
    files=8,
    repeated=1,
    backbone="shufflenet_v2_x0_5",
    regions_backbone="resnet18",
    upsample=None,
    width=64,
    layers=2,
    vocabulary=100,
    tokens=16,
    last_layers=2,
    batch=dict.fromkeys(BATCH, 4),
    large={},
    vae={
        "image_size": 16,
        "num_tokens": 32,
        "codebook_dim": 8,
        "num_layers": 2,
        "num_resnet_blocks": 1,
        "hidden_dim": 8,
    },
    dalle={
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "dim_head": 16,
        "text_seq_len": 8,
        "num_text_tokens": 100,
    },
)


class Systems:
    """The systems and their batches, each built once.

    Args:
        sizes: model and data sizes.
        folder: where images and the VAE checkpoint are written.
        device: target of the batches; they are pinned for a GPU.
    """

    def __init__(self, sizes: Sizes, folder: Path, device: torch.device) -> None:
        self.sizes, self.folder, self.device = sizes, folder, device
        self._models: dict[str, Any] = {}
        self._images: dict[str, ImageDataset] = {}
        self._batches: dict[tuple[str, int], Batch] = {}

    def model(self, name: str, chunk: int | None = None) -> Any:
        """A system on the CPU with random weights, the same each time.

        Args:
            name: the system.
            chunk: `forward_batch_size` of a contrastive system.
        """
        if name not in self._models:
            torch.manual_seed(0)
            self._models[name] = self._make(name)
        model = copy.deepcopy(self._models[name])
        if chunk is not None:
            model.forward_batch_size = chunk
        return model

    def images(self, name: str, **settings: Any) -> ImageDataset:
        """The training images of a system: files of phantom X-rays."""
        root = self.folder / "phantom"
        if not root.exists():
            plan = Plan(
                train=self.sizes.files, validate=1, test=1, size=self.sizes.file_pixels, seed=0
            )
            build(root, plan)
            lines = root / "train.image.tok"
            lines.write_text(lines.read_text() * self.sizes.repeated)
        options: dict[str, Any]
        if name == "VAE":
            side = self.sizes.vae["image_size"]
            options = {"preset": "center_crop", "mean": [0], "std": [1]}
        else:
            side = self.sizes.pixels
            options = {"preset": "resize_crop", "views": 2 if name == "SimCLR" else 1}
        options |= {"resize": side if name == "VAE" else side * 8 // 7, "crop": side, **settings}
        return ImageDataset(split="train", training=True, seed=0, root=str(root), **options)

    def prepare(self, name: str) -> Prepare:
        """The data set's `prepare`, which runs on the device."""
        if name == "DALLE":
            return lambda batch: batch
        return self._dataset(name).prepare

    def batch(self, name: str, size: int) -> Batch:
        """A batch as the loader returns it."""
        if (name, size) not in self._batches:
            self._batches[name, size] = self._make_batch(name, size)
        return dict(self._batches[name, size])

    def _make_batch(self, name: str, size: int) -> Batch:
        random = torch.Generator().manual_seed(1)
        batch: Batch = {"index": torch.arange(size)}
        if name == "DALLE":
            shape = (size, self.sizes.image_tokens)
            codes = self.sizes.vae["num_tokens"]
            batch["image_tokens"] = torch.randint(codes, shape, generator=random)
        else:
            data = self._dataset(name)
            batch = data.collate([data[SampleKey(n % len(data))] for n in range(size)])
        if name in ("ConVIRT", "GLoRIA", "DALLE"):
            longest = self.sizes.dalle["text_seq_len"] if name == "DALLE" else self.sizes.tokens
            lengths = torch.randint(longest // 4, longest + 1, (size, 1), generator=random)
            lengths[0] = longest
            mask = (torch.arange(longest) < lengths).long()
            ids = torch.randint(4, self.sizes.vocabulary, (size, longest), generator=random)
            if name == "DALLE":
                ids %= self.sizes.dalle["num_text_tokens"]
            batch |= {"input_ids": ids * mask, "attention_mask": mask}
            if name == "GLoRIA":  # three words of four tokens
                words = (torch.arange(longest) * 3 // 4).expand(size, longest)
                batch["word_ids"] = words.masked_fill(mask == 0, -1)
        if self.device.type == "cuda":
            batch = {
                key: value.pin_memory() if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
        return batch

    def _dataset(self, name: str) -> ImageDataset:
        if name not in self._images:
            self._images[name] = self.images(name)
        return self._images[name]

    def _make(self, name: str) -> Any:
        sizes, spec = self.sizes, tiny_spec(max_len=self.sizes.tokens)
        if name == "VAE":
            return VAE(**sizes.vae)
        if name == "DALLE":
            path = self.folder / "vae.pth"
            config = {"model": {"proto": "VAE", **sizes.vae}}
            torch.save({"model": VAE(**sizes.vae).state_dict(), "config": config}, path)
            return DALLE(
                spec=tiny_spec(max_len=sizes.dalle["text_seq_len"]),
                vae=FrozenVAE(ckpt=str(path)),
                dalle=TransformerSettings(**sizes.dalle),
            )
        backbone = sizes.regions_backbone if name == "GLoRIA" else sizes.backbone
        cnn = VisionEncoder(backbone=backbone, pretrained=False)
        features, width = cnn.out_features, sizes.width
        if name == "SimCLR":
            head = VisualProjection(visual_embedding_dim=features, projection_dim=width)
            return SimCLR(cnn=cnn, projection=head, loss=NTXentLoss(tau=0.5))
        if name == "ConVIRT":
            return ConVIRT(
                spec=spec,
                encoder=TextEncoder(spec=spec, **sizes.bert),
                cnn=cnn,
                projection=PairedProjection(
                    visual_embedding_dim=features,
                    textual_embedding_dim=width,
                    projection_dim=width,
                ),
                loss=ConVIRTLoss(tau=0.1, lambda_=0.75),
            )
        return GLoRIA(
            spec=spec,
            encoder=WordEncoder(spec=spec, last_n_layers=sizes.last_layers, **sizes.bert),
            cnn=cnn,
            visual_embedder=VisualEmbedder(
                interm_feature_dim=cnn.width("layer3"), feature_dim=features
            ),
            loss=GLoRIALoss(),
            upsample=sizes.upsample,
        )


def trainor_section(**wanted: Any) -> TrainorSection:
    """The trainor section.

    Raises:
        Lacking: this version does not have one of the keys.
    """
    known = {one.name for one in dataclasses.fields(TrainorSection)}
    if unknown := [name for name in wanted if name not in known]:
        raise Lacking(f"this version has no trainor.{unknown[0]}")
    options = {"lr": 1e-5, **wanted.pop("optim_params", {})}
    return TrainorSection(optim_params=options, **wanted)


def our_step(
    model: Any, prepare: Prepare, device: torch.device, **settings: Any
) -> Callable[[Batch], StepResult]:
    """The training step of this package; it takes over the model.

    Args:
        model: the model, on the CPU.
        prepare: `prepare` of the data set.
        device: where to compute.
        settings: keys of the section `trainor`.
    """
    section = trainor_section(**settings)
    prepare_network(model, section, device)
    model.train()
    optimizer = make_optimizer(model, section)
    step = TrainingStep(model, prepare, optimizer, section, device)
    return lambda batch: step([batch])
