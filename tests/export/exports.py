"""Write runs of the five systems with random weights, for export tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from tests.small_dalles import TINY_TRANSFORMER, TINY_VAE, save_vae
from tests.small_models import TINY_BERT, tiny_spec
from vilmedic.blocks.pretrained import network_configs
from vilmedic.checkpoints.checkpoint import save_checkpoint
from vilmedic.config import build
from vilmedic.datasets.aligned import DataSpec
from vilmedic.evaluation.evaluations import EvaluationFolder
from vilmedic.registry import MODELS

BEST = "0.5_3_7.pth"
TEXTS = ["large left pleural effusion.", "no acute effusion, heart normal, no small effusion."]
LENGTH = 16
IMAGE: dict[str, Any] = {"root": "data/tiny", "resize": 40, "crop": 32}
SEQ: dict[str, Any] = {"root": "data/tiny", "tokenizer": None, "tokenizer_max_len": LENGTH}
ENCODER: dict[str, Any] = {"proto": None, **TINY_BERT}
PAIRS = {"proto": "ImSeq", "image": IMAGE, "seq": SEQ}
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}


def cnn(backbone: str, **settings: Any) -> dict[str, Any]:
    return {"proto": "CNN", "backbone": backbone, "pretrained": False, **settings}


def convirt(backbone: str = "resnet18", width: int = 512, **encoder: Any) -> dict[str, Any]:
    """A configuration of ConVIRT."""
    projection = {"textual_embedding_dim": 16, "projection_dim": 8, "visual_embedding_dim": width}
    model = {"proto": "ConVIRT", "encoder": ENCODER | {"pooling": "mean"} | encoder}
    model |= {"cnn": cnn(backbone), "projection": projection, "loss": {"proto": "ConVIRTLoss"}}
    return {"name": "tiny-convirt", "model": model, "dataset": PAIRS}


def simclr(backbone: dict[str, Any], width: int) -> dict[str, Any]:
    """A configuration of SimCLR for colour images."""
    projection = {"visual_embedding_dim": width, "projection_dim": 8}
    model = {"proto": "SimCLR", "cnn": backbone, "projection": projection}
    dataset = {"proto": "ImageDataset", **IMAGE, "views": 2, "preset": "simclr", "color": "rgb"}
    model["loss"] = {"proto": "NTXentLoss", "tau": 0.5}
    return {"name": "tiny-simclr", "model": model, "dataset": dataset}


def gloria() -> dict[str, Any]:
    """A configuration of GLoRIA, with a network whose weights have other names in timm."""
    model = {"proto": "GLoRIA", "encoder": ENCODER | {"num_hidden_layers": 2, "last_n_layers": 2}}
    model |= {"cnn": cnn("squeezenet1_1"), "local_layer": "features.7", "upsample": 48}
    model["visual_embedder"] = {"interm_feature_dim": 256, "feature_dim": 512}
    model["loss"] = {"proto": "GLoRIALoss"}
    return {"name": "tiny-gloria", "model": model, "dataset": PAIRS}


def plain(image_size: int) -> dict[str, Any]:
    """Image settings for a model that normalises images itself."""
    sizes = {"resize": image_size, "crop": image_size, "preset": "center_crop"}
    return {"root": "data/tiny", "mean": [0], "std": [1], **sizes}


def vae() -> dict[str, Any]:
    """A configuration of a VAE."""
    dataset = {"proto": "ImageDataset", **plain(16)}
    return {"name": "tiny-vae", "model": {"proto": "VAE", **TINY_VAE}, "dataset": dataset}


def dalle(folder: Path) -> dict[str, Any]:
    """A configuration of DALLE, with its VAE in a folder."""
    model = {"proto": "DALLE", "dalle": TINY_TRANSFORMER | {"text_seq_len": LENGTH}}
    model["vae"] = {"ckpt": str(save_vae(folder / "vae.pth")), "image_size": 16}
    dataset = {"proto": "ImSeq", "image": plain(16), "seq": SEQ}
    return {"name": "tiny-dalle", "model": model, "dataset": dataset}


def save_run(
    run_dir: Path, config: dict[str, Any], spec: DataSpec | None = None, **more: Any
) -> nn.Module:
    """Write a run directory with one best checkpoint and the model's averaged weights."""
    torch.manual_seed(1)
    system = config["model"]["proto"]
    if spec is None:
        spec = DataSpec() if system in ("SimCLR", "VAE") else tiny_spec(LENGTH)
    model: nn.Module = build(MODELS, config["model"], spec=spec)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.add_(torch.rand_like(buffer) * (0.01 if "mean" in name else 0.3))
    if system == "VAE":
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)  # makes codes differ
    weights = model.state_dict()
    averaged = {k: v + 0.01 if v.is_floating_point() else v for k, v in weights.items()}
    run_dir.mkdir(parents=True)
    state = {
        **{"model": weights, "ema": averaged, "config": config, "data": spec.to_plain()},
        **{"networks": network_configs(model), "progress": {"step": 40, "epoch": 4}},
        **{"metric": "validation_loss", "better": "lower", "score": 0.5, "epoch": 3, "seed": 7},
        **more,
    }
    save_checkpoint(state, run_dir / BEST)
    said = {
        "command": ["bin/train.py", "my.yml", f"name={config['name']}"],
        "python": "3.11.7",
        "versions": {"vilmedic": "0.1.0", "torch": "2.14.1"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
    }
    (run_dir / "environment_7.json").write_text(json.dumps(said))
    return model


def evaluate(run_dir: Path, auroc: float, *, ema: bool = False, file: str = BEST) -> str:
    """Write an evaluation as `bin/ensemble.py` does; return the name of its folder."""
    checkpoint = {"file": file, "epoch": 3, "seed": 7, "metric": "validation_loss", "score": 0.5}
    measured = {"auroc": auroc, "auroc_interval": [auroc - 0.1, auroc + 0.1]}
    results = {
        **{"run": "tiny", "system": "ConVIRT", "split": "test", "samples": 10, "loss": 1.25},
        **{"checkpoints": [checkpoint], "models_used": 1, "ema": ema, "seed": 0, "changed": {}},
        **{"batch_size": 4, "precision": "fp32"},
        "protocols": {"zero_shot": {"prompts": "mine.yml", "bootstrap": 1000}},
        "metrics": {"zero_shot": measured},
        "baselines": {"untrained": {"loss": 2.5, "metrics": {}}},
    }
    folder = EvaluationFolder(
        run_dir,
        "best-1",
        ema=ema,
        settings={"auroc": auroc, "file": file},
        about={"system": "ConVIRT", "checkpoints": [checkpoint], "generated": False},
    )
    results["evaluation"] = folder.name
    folder.write(results)
    return folder.name


def image_file(path: Path, *, color: bool = False, seed: int = 0) -> Path:
    """A PNG of 44 x 50 pixels with varying pixels."""
    shape = (44, 50, 3) if color else (44, 50)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)).save(path)
    return path
