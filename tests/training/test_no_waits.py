"""No training step waits for the GPU; each system is run on a fake one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.fake_device import DEVICE, Waits, fake_device
from tests.small_dalles import dalle_batch, save_vae, tiny_dalle
from tests.small_models import (
    tiny_batch,
    tiny_cnn,
    tiny_encoder,
    tiny_gloria,
    tiny_spec,
    tiny_vae,
    tiny_views,
)
from vilmedic.blocks.projection import PairedProjection, VisualEmbedder, VisualProjection
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.sections import TrainorSection
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.transforms import Pixels
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.gloria import GLoRIA
from vilmedic.models.simclr import SimCLR
from vilmedic.registry import LOSSES
from vilmedic.training.averaged_weights import AveragedWeights
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.resume import Progress
from vilmedic.training.step import Tally, TrainingStep

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3},
    "SGD": {"lr": 1e-3, "momentum": 0.9},
}

HOW: dict[str, Any] = {
    "training": True,
    "resize": None,
    "crop": 32,
    "color": "grey",
    "views": 1,
    "preset": "resize_crop",
    "transforms": None,
    "eval_transforms": None,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "max_pixels": 2**20,
}
PIXELS = Pixels(**HOW)


def prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """Prepare a batch on the device, as an image data set does."""
    part: Any = SimpleNamespace(pixels=PIXELS)
    return ImageDataset.finish(part, batch)


def pixels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch as the loader returns it, with one uint8 channel, which `prepare` converts."""
    images = batch["images"]
    grey = torch.zeros(*images.shape[:-3], 1, *images.shape[-2:], dtype=torch.uint8)
    return batch | {"images": grey}


def several(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two images per sample; some samples have only one."""
    images = batch["images"].unsqueeze(1).expand(-1, 2, -1, -1, -1)
    mask = torch.ones(len(images), 2, dtype=torch.bool)
    mask[1:, 1] = False
    return batch | {"images": images, "images_mask": mask}


def small_cnn() -> VisionEncoder:
    """The first layers of a network with batch normalisation; they give 8 x 8 positions."""
    return tiny_cnn(output_layer="maxpool")


def small_convirt(**settings: Any) -> ConVIRT:
    widths = {"visual_embedding_dim": 24, "textual_embedding_dim": 16, "projection_dim": 8}
    spec = tiny_spec()
    return ConVIRT(
        spec=spec,
        encoder=tiny_encoder(spec),
        cnn=small_cnn(),
        projection=PairedProjection(**widths),
        **{"loss": ConVIRTLoss(), **settings},
    )


def small_simclr(**settings: Any) -> SimCLR:
    head = VisualProjection(visual_embedding_dim=24, projection_dim=8)
    return SimCLR(cnn=small_cnn(), projection=head, loss=NTXentLoss(), **settings)


def small_gloria(**settings: Any) -> GLoRIA:
    widths = VisualEmbedder(interm_feature_dim=24, feature_dim=24)
    settings |= {"cnn": small_cnn(), "visual_embedder": widths, "local_layer": "maxpool"}
    return tiny_gloria(**settings)


def system(name: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model on the CPU, and a batch for it."""
    chunks: dict[str, Any] = {"forward_batch_size": 2} if name.endswith("chunks") else {}
    if name.endswith("Loss"):
        return small_convirt(loss=LOSSES.get(name)()), pixels(tiny_batch())
    if name.startswith("ConVIRT"):
        batch = pixels(tiny_batch())
        return small_convirt(**chunks), batch if name == "ConVIRT" else several(batch)
    if name.startswith("SimCLR"):
        return small_simclr(**chunks), pixels(tiny_views())
    if name.startswith("GLoRIA"):
        return small_gloria(**chunks), pixels(tiny_batch())
    if name == "VAE":
        vae = tiny_vae(kl_div_loss_weight=0.1, straight_through=True)
        return vae, pixels({"index": torch.arange(4), "images": torch.zeros(4, 3, 16, 16)})
    settings = {"null_cond_prob": 0.5, "attn_types": ["full", "axial_row"], "attn_dropout": 0.1}
    return tiny_dalle(save_vae(folder / "vae.pth"), **settings), pixels(dalle_batch())


SYSTEMS = (
    "ConVIRT",
    "ConVIRT with several images",
    "ConVIRT in chunks",
    "BarlowTwinsLoss",
    "InfoNCELoss",
    "SigLIPLoss",
    "VICRegLoss",
    "SimCLR",
    "SimCLR in chunks",
    "GLoRIA",
    "GLoRIA in chunks",
    "VAE",
    "DALLE",
)


PRECISIONS = {"AdamW": "bf16", "RAdam": "fp32", "SGD": "fp16"}


def waits_of(model: Any, batch: dict[str, torch.Tensor], optimizer: str, precision: str) -> Waits:
    """The waits of a whole step, after a first one, which may copy constants."""
    section = TrainorSection(
        optimizer=optimizer,
        optim_params=OPTIMIZERS[optimizer],
        precision=precision,
        clip_grad_norm=1.0,
    )
    step = TrainingStep(model, prepare, make_optimizer(model, section), section, DEVICE)
    average, tally = AveragedWeights(model, 0.99), Tally(DEVICE, Progress().tally)
    for number in (1, 2):
        model.schedule(number)
        waits = Waits()
        with waits:
            result = step([batch] * number)
            tally.add(result)
            average.update(number, result.taken)
    return waits


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_step_waits(name: str, tmp_path: Path) -> None:
    model, batch = system(name, tmp_path)
    with fake_device():
        model.to(DEVICE).train()
        seen = {one: waits_of(model, batch, one, how).seen for one, how in PRECISIONS.items()}
    assert seen == {"AdamW": [], "RAdam": [], "SGD": []}


def test_no_optimizer_waits_in_any_precision(tmp_path: Path) -> None:
    model, batch = system("VAE", tmp_path)
    seen = {}
    with fake_device():
        model.to(DEVICE).train()
        for optimizer in OPTIMIZERS:
            for precision in ("fp32", "bf16", "fp16"):
                found = waits_of(model, batch, optimizer, precision).seen
                seen |= {(optimizer, precision): found} if found else {}
    assert seen == {}


@pytest.mark.parametrize(("preset", "color"), [("convirt", "grey"), ("simclr", "rgb")])
def test_augmentations_do_not_wait(preset: str, color: str) -> None:
    how = Pixels(**HOW | {"preset": preset, "color": color})
    channels = 3 if color == "rgb" else 1
    image = torch.zeros(channels, 40, 40, dtype=torch.uint8)
    cut = [how.cut(image, 0, 0, line, 0) for line in range(3)]
    images = torch.stack([one for one, _ in cut]).to(DEVICE)
    rows = torch.tensor([row for _, row in cut]).to(DEVICE)
    with fake_device():
        how.normalized(images, rows)
        with Waits() as waits:
            how.normalized(images, rows)
    assert waits.seen == []


def test_waiting_operations_are_recorded() -> None:
    """Each of these waits on a GPU; a queued copy does not."""
    here, mask = torch.ones(3), torch.tensor([True, False, True])
    there = here.to(DEVICE)
    waits = Waits()
    with waits:
        here.sum().item()
        here.tolist()
        here[mask]
        here.to(DEVICE)
        there[torch.tensor([0, 1])]
        torch.tensor([1.0], device=DEVICE)
        there.new_tensor([1.0])
        here.to(DEVICE, non_blocking=True)
        torch.where(there > 0, there, 0.0)
        there.new_zeros(3)
    noted = [one.split(" at ")[0] for one in waits.seen]
    for name in ("aten._local_scalar_dense", "aten.index.Tensor", "aten._to_copy", "tensor"):
        assert any(one.startswith(name) for one in noted), (name, noted)
    assert "new_tensor" in noted
    assert sum(one.startswith("aten._to_copy") for one in noted) == 1
    assert sum(one.startswith("aten.index.Tensor") for one in noted) == 2
