"""The models that images are generated with, out of the checkpoints of a run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilmedic.config.generation import GenerationSection
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.executors.checkpoint import load_checkpoint, load_weights
from vilmedic.models.dalle import DALLE

LOGGER = logging.getLogger("vilmedic")


def load_generators(
    model: nn.Module, paths: Sequence[Path], section: GenerationSection
) -> list[DALLE]:
    """A model for each checkpoint, all with one VAE.

    Args:
        model: what the configuration describes, on its device.
        paths: the checkpoints.
        section: what is to be made, for a warning about guidance without training for it.

    Raises:
        ConfigError: the model makes no images.
        CheckpointError: a checkpoint does not fit, or the VAEs in them differ.
    """
    if not isinstance(model, DALLE):
        raise ConfigError(
            f"ensemblor.generate_images: {type(model).__name__} makes no images of reports. "
            "Allowed: model.proto=DALLE."
        )
    models: list[DALLE] = []
    for path in paths:
        state = load_checkpoint(path)
        one = copy.deepcopy(model) if models else model
        load_weights(one, state, path)
        if models and not _same(models[0].vae, one.vae):
            raise CheckpointError(
                f"{path}: its VAE is another one than that of {paths[0]}, so their tokens mean "
                "different things and cannot be averaged. Choose checkpoints with one VAE."
            )
        if models:
            one.vae = models[0].vae
        dropped = _trained_without_text(state, one)
        if section.cond_scale != 1 and not dropped:
            LOGGER.warning(
                "ensemblor.cond_scale is %g, but %s was trained with "
                "model.dalle.null_cond_prob=0: it never saw an image without its text, so "
                "guidance has nothing to go by.",
                section.cond_scale,
                path.name,
            )
        models.append(one.eval())
    return models


def _same(first: nn.Module, second: nn.Module) -> bool:
    own, other = first.state_dict(), second.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)


def _trained_without_text(state: dict[str, Any], model: DALLE) -> float:
    """The share of samples whose text was dropped, as the checkpoint or the model says."""
    settings = ((state.get("config") or {}).get("model") or {}).get("dalle") or {}
    share: float = settings.get("null_cond_prob", 0.0) if settings else model.null_cond_prob
    return share
