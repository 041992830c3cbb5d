"""Small versions of the systems for the crash tests; a run takes seconds.

Each is a configuration on the phantom data set with overrides that make it small.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.small_dalles import TINY_VAE, save_vae

CNN = ("model.cnn.backbone=shufflenet_v2_x0_5",)
BERT = (
    "model.encoder.hidden_size=16",
    "model.encoder.intermediate_size=32",
    "model.encoder.num_attention_heads=2",
    "model.encoder.num_hidden_layers=1",
)
IMAGES_AND_REPORTS = ("image", "seq", "label")


@dataclass(frozen=True)
class System:
    """A system to train.

    Args:
        name: its proto.
        config: the configuration file.
        parts: sections of `dataset` that have a `root`; empty if `dataset` itself has it.
        small: overrides that make it small.
        behind_vae: needs a VAE, and gets one with random weights.
    """

    name: str
    config: str
    parts: tuple[str, ...]
    small: tuple[str, ...]
    behind_vae: bool = False

    def arguments(self, data: Path) -> list[str]:
        """Arguments of the training command on a data set."""
        sections = [f"dataset.{part}" for part in self.parts] or ["dataset"]
        roots = [f"{section}.root={data}" for section in sections]
        image = "dataset.image" if "image" in self.parts else "dataset"
        if self.behind_vae:
            roots.append(f"model.vae.ckpt={save_vae(data.with_name('vae.pth'))}")
        return [
            self.config,
            *roots,
            f"{image}.resize=32",
            f"{image}.crop=32",
            *self.small,
            "validator.batch_size=8",
            "trainor.early_stop_metric=validation_loss",
            "trainor.precision=fp32",
            "trainor.device=cpu",
            "trainor.seed=3",
            "trainor.batch_size=4",
            "trainor.grad_accu=2",
            "trainor.epochs=3",
            "trainor.keep=2",
            "trainor.keep_states=2",
            "trainor.ema=0.9",
            "trainor.log_every=1",
            "trainor.save_every=1",
        ]


CONVIRT = System(
    "ConVIRT",
    "config/phantom/convirt.yml",
    IMAGES_AND_REPORTS,
    (
        *CNN,
        *BERT,
        "~validator.metrics",
        "model.projection.visual_embedding_dim=1024",
        "model.projection.textual_embedding_dim=16",
        "model.projection.projection_dim=8",
        "model.forward_batch_size=2",
    ),
)
SIMCLR = System(
    "SimCLR",
    "config/phantom/simclr.yml",
    (),
    (
        *CNN,
        "dataset.transforms=[{RandomAffine: {degrees: 10}}]",
        "model.projection.visual_embedding_dim=1024",
        "model.projection.projection_dim=8",
    ),
)
GLORIA = System(
    "GLoRIA",
    "config/phantom/gloria.yml",
    IMAGES_AND_REPORTS,
    (
        *CNN,
        *BERT,
        "~validator.metrics",
        "model.encoder.last_n_layers=1",
        "model.local_layer=stage2",
        "model.visual_embedder.interm_feature_dim=48",
        "model.visual_embedder.feature_dim=1024",
        "model.forward_batch_size=2",
    ),
)
VAE = System(
    "VAE",
    "config/phantom/vae.yml",
    (),
    (
        *(f"model.{name}={value}" for name, value in TINY_VAE.items()),
        "model.image_size=32",
        "~validator.metrics",
        "~validator.post_processing",
    ),
)
DALLE = System(
    "DALLE",
    "config/phantom/dalle.yml",
    ("image", "seq"),
    (
        "dataset.image.resize=16",
        "dataset.image.crop=16",
        *(f"model.vae.{name}={value}" for name, value in TINY_VAE.items()),
        "model.dalle.dim=16",
        "model.dalle.depth=1",
        "model.dalle.heads=2",
        "model.dalle.dim_head=12",
    ),
    behind_vae=True,
)
SYSTEMS = (CONVIRT, SIMCLR, GLORIA, VAE, DALLE)
