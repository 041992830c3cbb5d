"""Image generators loaded from the checkpoints of a run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vilmedic.checkpoints.checkpoint import load_checkpoint, load_weights
from vilmedic.config.sections import GenerationSection
from vilmedic.errors import ConfigError
from vilmedic.models.dalle import DALLE

LOGGER = logging.getLogger("vilmedic")


def load_generators(
    model: nn.Module, paths: Sequence[Path], section: GenerationSection, *, ema: bool = False
) -> list[DALLE]:
    """A model for each checkpoint, all with one VAE.

    Args:
        model: the configured model, on its device.
        paths: the checkpoints.
        section: the options of generation, for a warning about guidance without training for it.
        ema: take the averaged weights.

    Raises:
        ConfigError: the model makes no images.
        CheckpointError: a checkpoint does not fit, or holds another VAE.
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
        load_weights(one, state, path, ema=ema)
        if models:
            one.vae = models[0].vae
        dropped = _trained_without_text(state, one)
        warn_of_guidance("ensemblor.cond_scale", section.cond_scale, dropped, path.name)
        models.append(one.eval())
    return models


def warn_of_guidance(key: str, cond_scale: float, dropped: float, name: str) -> None:
    """Warn if a model was not trained for guidance.

    Args:
        key: the key of the guidance.
        cond_scale: its value.
        dropped: the share of samples whose text was dropped in training.
        name: the checkpoint.
    """
    if cond_scale != 1 and not dropped:
        LOGGER.warning(
            "%s is %g, but %s was trained with model.dalle.null_cond_prob=0: it never saw an image "
            "without its text, so guidance does not work.",
            key,
            cond_scale,
            name,
        )


def _trained_without_text(state: dict[str, Any], model: DALLE) -> float:
    """The share of samples whose text was dropped, as the checkpoint or the model says."""
    settings = ((state.get("config") or {}).get("model") or {}).get("dalle") or {}
    share: float = settings.get("null_cond_prob", 0.0) if settings else model.null_cond_prob
    return share
