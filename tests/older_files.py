"""Write checkpoint files in the formats of the original vilmedic and dalle-pytorch."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn


def write_vilmedic(path: Path, model: nn.Module, settings: dict[str, Any], **names: str) -> None:
    """The format of its last versions: weights, schedule, optimizer and pickled configuration."""
    optimizer = torch.optim.RAdam(model.parameters())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.8)
    plateau.step(np.float64(0.25))
    config = OmegaConf.create(
        {
            "optimizer": "RAdam",
            "optim_params": {"lr": 0.001},
            "lr_decay_params": {"factor": 0.8, "min_lr": "${optim_params.lr}"},
            "metrics": [],
            "name": "vae",
            "dataset": {
                "proto": "ImageDataset",
                "custom_transform_train": "transforms.Compose([transforms.ToTensor()])",
            },
            "model": {"proto": "VAE", "temperature": 0.9, "straight_through": False, **settings},
        }
    )
    contents = {
        "model": renamed(model.state_dict(), names.get("prefix", "vae.")),
        "training_scheduler": {
            "epoch": 33,
            "metric_comp_func": operator.lt,
            "current_best_metric": np.float64(0.00229),
            "lr_decay_params": dict(config.lr_decay_params),
            "scheduler": plateau.state_dict(),
        },
        "optimizer": optimizer.state_dict(),
        "config": config,
        "scaler": {},
        "__version__": "1.3.2",
    }
    torch.save(contents, path)


def write_first_vilmedic(path: Path, model: nn.Module) -> None:
    """The format of its first versions: weights only."""
    torch.save(renamed(model.state_dict(), "module.vae."), path)


def write_dalle_pytorch_vae(path: Path, model: nn.Module, hparams: dict[str, Any]) -> None:
    """The file that dalle-pytorch's `train_vae.py` saves."""
    torch.save({"hparams": hparams, "weights": model.state_dict()}, path)


def write_dalle_pytorch_dalle(path: Path, weights: dict[str, Tensor], **parts: Any) -> None:
    """The file that dalle-pytorch's `train_dalle.py` saves."""
    rest = {"epoch": 3, "version": "1.6.6", "vae_class_name": "DiscreteVAE", "opt_state": {}}
    torch.save({**rest, "scheduler_state": None, "weights": weights, **parts}, path)


def renamed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}
