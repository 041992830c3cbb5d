"""A tiny network of each backbone family, built from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models._hub import save_for_hf
from torch import nn
from transformers import AutoConfig, AutoModel

TOKENS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WINDOWS: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
WINDOWS["drop_path_rate"] = 0.0


class Family(NamedTuple):
    """A backbone, its settings, a layer with regions, and that layer's grid at 32 pixels."""

    backbone: str
    config: dict[str, Any]
    local: str
    grid: int


FAMILIES = {
    "ViT": Family("hf:vit", {**TOKENS, "intermediate_size": 32}, "layers.0", 4),
    "DINOv2": Family("hf:dinov2", {**TOKENS, "mlp_ratio": 2}, "last_hidden_state", 4),
    "DINOv2 with registers": Family(
        "hf:dinov2_with_registers",
        {**TOKENS, "mlp_ratio": 2, "num_register_tokens": 3},
        "last_hidden_state",
        4,
    ),
    "ConvNeXt": Family(
        "hf:convnext",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": 32},
        "last_hidden_state",
        4,
    ),
    "Swin": Family(
        "hf:swin", {**WINDOWS, "image_size": 32, "patch_size": 4}, "last_hidden_state", 4
    ),
    "timm ViT": Family(
        "timm/vit_small_patch14_reg4_dinov2",
        {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8},
        "blocks.0",
        4,
    ),
    "timm ConvNeXt": Family(
        "timm/convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}, "stages.1", 4
    ),
    "timm Swin": Family(
        "timm/swin_tiny_patch4_window7_224", {**WINDOWS, "img_size": 32}, "layers.1", 4
    ),
}


def of_library(family: Family) -> nn.Module:
    """The network as its library builds it, without a classifier."""
    library, name = family.backbone.replace("/", ":").split(":")
    if library == "timm":
        model: nn.Module = timm.create_model(name, num_classes=0, **family.config)
        return model
    return AutoModel.from_config(AutoConfig.for_model(name, **family.config))


def saved(family: Family, folder: Path) -> tuple[str, nn.Module]:
    """Save a network as its library does; return its backbone name and the network."""
    network = of_library(family).eval()
    if family.backbone.startswith("timm/"):
        save_for_hf(network, str(folder), safe_serialization=True)
        return f"timm/{folder}", network
    network.save_pretrained(folder)
    return f"hf:{folder}", network
