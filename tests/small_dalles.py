"""Small DALLE models for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.small_models import tiny_spec
from vilmedic.models.dalle import DALLE
from vilmedic.models.dalle_settings import FrozenVAE, TransformerSettings
from vilmedic.models.vae import VAE

TINY_VAE: dict[str, Any] = {
    "image_size": 16,
    "num_tokens": 24,
    "codebook_dim": 8,
    "num_layers": 2,
    "num_resnet_blocks": 1,
    "hidden_dim": 8,
}
TINY_TRANSFORMER: dict[str, Any] = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_head": 12,
    "text_seq_len": 6,
}


def save_vae(path: Path, **settings: Any) -> Path:
    """Save a checkpoint of a VAE with random weights."""
    torch.manual_seed(0)
    settings = TINY_VAE | settings
    vae = VAE(**settings)
    vae.decoder[-1].weight.data *= 40  # so that images of different tokens look different
    config = {"model": {"proto": "VAE", **settings}}
    torch.save({"model": vae.state_dict(), "config": config, "settings": settings}, path)
    return path


def tiny_dalle(vae: Path, *, spec: Any = None, **settings: Any) -> DALLE:
    """A DALLE with 4 x 4 image tokens, 6 text positions and random weights."""
    torch.manual_seed(1)
    dalle = TransformerSettings(**TINY_TRANSFORMER | settings)
    return DALLE(spec=spec or tiny_spec(6), vae=FrozenVAE(ckpt=str(vae)), dalle=dalle)


def dalle_batch(size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Reports of different lengths and images, in the form that `prepare` returns."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 15, (size, 5), generator=random)
    lengths = torch.randint(1, 6, (size, 1), generator=random)
    mask = (torch.arange(5) < lengths).long()
    return {
        "index": torch.arange(size),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "images": torch.rand(size, 3, 16, 16, generator=random),
    }
