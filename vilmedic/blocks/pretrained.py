"""Models of transformers by hub name or local folder, with errors that say the remedy."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from vilmedic.errors import ConfigError, nearest

log = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def load_config(key: str, name: str, settings: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a published model, with some of its fields changed.

    Args:
        key: the configuration key that holds the name, for messages.
        name: a local folder or a hub name.
        settings: fields to change.

    Raises:
        ConfigError: if there is no such model within reach, or no such field.
    """
    folder = Path(name)
    if not folder.is_dir() and not HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"{key}: there is no folder {folder.absolute()}, and '{name}' is not a hub name "
            f"(owner/model) either. Download the model into that folder or correct {key}."
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(key, name, error)) from error
    known = config.to_dict()
    unknown = [field for field in settings if field not in known]
    if unknown:
        raise ConfigError(
            f"{_section(key)}.{field} is not a setting of {type(config).__name__}, which {name} "
            f"uses.{nearest(field, known)}"
            for field in unknown
        )
    for field, value in settings.items():
        setattr(config, field, value)
    return config


def load_model(
    key: str, name: str, config: PretrainedConfig, *, pooler: bool, weights: bool = True
) -> PreTrainedModel:
    """A published model with its weights; safetensors are preferred, pickles are not executed.

    Args:
        key: the configuration key that holds the name, for messages.
        name: a local folder or a hub name.
        config: what `load_config` gave.
        pooler: whether the pooled output is used; where the class can do without, it has none then.
        weights: whether to load the weights, or to leave them random.

    Raises:
        ConfigError: if the weights are out of reach or do not fit the configuration.
    """
    architecture: Any = MODEL_MAPPING[type(config)]
    options: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(architecture.__init__).parameters:
        options["add_pooling_layer"] = pooler
    if not weights:
        return AutoModel.from_config(config, **options)
    try:
        with _quiet():
            model, info = AutoModel.from_pretrained(
                name, config=config, output_loading_info=True, **options
            )
    except OSError as error:
        raise ConfigError(_not_found(key, name, error)) from error
    except RuntimeError as error:
        raise ConfigError(
            f"{key}: the weights of {name} do not fit its settings: {_first_line(error)}. "
            "Leave out the settings that change the shape of weights."
        ) from error
    fresh = sorted(info["missing_keys"])
    if fresh:
        log.warning(
            "%s: %s has no weights for %s; they start at random values and are trained.",
            key,
            name,
            ", ".join(fresh),
        )
    return model


def _not_found(key: str, name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return (
            f"{key}: the folder {Path(name).absolute()} does not hold a transformers model "
            f"(config.json and model.safetensors or pytorch_model.bin): {_first_line(error)}"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached or has no such model"
    return (
        f"{key}: there is no folder {Path(name).absolute()}, '{name}' is not in the local cache of "
        f"the hub, and {why}. Download the model once with a network (hf download {name}), or set "
        f"{key} to the folder of a local copy."
    )


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing a table of weights; `load_model` says what matters."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
