"""Mean, standard deviation and size of images, as published weights were trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vilmedic.config.declared import IMAGES
from vilmedic.config.load import Config, ask, check_arguments
from vilmedic.config.trained import PUBLISHED, Difference, data_parts, with_values
from vilmedic.config.transformers_fields import HF, TIMM, backbone_of
from vilmedic.config.tree import dotted
from vilmedic.config.wording import shown
from vilmedic.errors import ConfigError
from vilmedic.log import LOGGER
from vilmedic.registry import MODELS


def with_published_pixels(config: Config, state: Mapping[str, Any] | None) -> Config:
    """Return a configuration with the image preprocessing of its backbone's published weights.

    Given keys stay, with a warning if they differ.

    Args:
        config: the checked configuration.
        state: the checkpoint of a resumed run, whose preprocessing stays; None for a new run.

    Raises:
        ConfigError: there is no such backbone.
    """
    if not backbone_of(config.data["model"]).startswith((HF, TIMM)):
        return config
    part = dict(data_parts(config.data["dataset"])).get(IMAGES)
    if part is None:
        return config
    path, node = part

    def taken(values: Mapping[str, Any], source: str) -> Config:
        keys = [Difference((*path, k), v, node.get(k), given=True) for k, v in values.items()]
        return with_values(config, keys, source) if keys else config

    if state is not None:
        saved = dict(data_parts((state.get("config") or {}).get("dataset") or {})).get(IMAGES)
        before = {} if saved is None else saved[1]
        left = [key for keys in PUBLISHED for key in keys if key not in node and key in before]
        return taken({key: before[key] for key in left}, "checkpoint")
    found = next((one for one in ask(MODELS, config.model, "published_pixels") if one), None)
    if found is None:
        return config
    values: dict[str, Any] = {}
    for keys in PUBLISHED:
        said = _usable({key: found.keys[key] for key in keys if key in found.keys}, found.source)
        given = [key for key in keys if key in node]
        if not given:
            values |= said
        for key in given:
            if key in said and said[key] != node[key]:
                LOGGER.warning(
                    "%s is %s, but its backbone was trained with %s, as %s says",
                    dotted((*path, key)),
                    shown(node[key]),
                    shown(said[key]),
                    found.source,
                )
    if values:
        listed = ", ".join(f"{key} {shown(value)}" for key, value in values.items())
        LOGGER.info("Images as %s says: %s", found.source, "; ".join([listed, *found.notes]))
    return taken(values, found.source)


def _usable(said: dict[str, Any], source: str) -> dict[str, Any]:
    """The keys of images that somebody states, or none with a warning where they make no images."""
    from vilmedic.datasets.image import ImageDataset  # only where there are keys to judge

    try:
        check_arguments(ImageDataset, {"root": ".", **said})
    except ConfigError as error:
        LOGGER.warning(
            "What %s says cannot be used (%s): %s stay as the configuration has them",
            source,
            str(error).partition("\n")[0],
            " and ".join(said),
        )
        return {}
    return said
