"""A trained VAE out of a checkpoint of this project or of an older one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vilmedic.checkpoints.checkpoint import find_checkpoints, load_checkpoint, load_weights
from vilmedic.checkpoints.older_formats import older_names, zoo_file
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.manifest import is_export
from vilmedic.models.vae import VAE

SHAPE = ("num_tokens", "codebook_dim", "num_layers", "num_resnet_blocks", "hidden_dim", "channels")
"""Hyperparameters that the weights themselves tell."""
STATED = ("image_size", "normalization")
"""Those that only the configuration in the file tells."""


def load_vae(path: str | Path, settings: Mapping[str, Any]) -> VAE:
    """A frozen VAE.

    Hyperparameters come from the checkpoint. Those that are given as well must agree with it.

    Args:
        path: a file, an exported folder, a folder of the original's model zoo, or a run directory,
            whose best checkpoint is taken.
        settings: arguments of `VAE`, as far as they are given. Those of its training
            (temperature, loss) have no effect on a frozen one and are not compared.

    Returns:
        The VAE, in evaluation mode and without gradients.

    Raises:
        CheckpointError: the file is missing, damaged, holds no VAE, or one that differs from the
            settings; all differences are listed.
        ConfigError: neither the file nor the settings tell the size of the images.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"model.vae.ckpt: there is no {path}, neither a file nor a folder.")
    if path.is_dir() and zoo_file(path) is None and not is_export(path):
        path = find_checkpoints(path, "best-1", remedy="Name the file to use")[0]
    state = load_checkpoint(path)
    weights = _vae_weights(state["model"], path)
    actual = {**_stated(state.get("config")), **_shape(weights, path)}
    differences = [
        f"{name} is {_shown(actual[name])}, the configuration says {_shown(settings[name])}"
        for name in (*STATED, *SHAPE)
        if name in settings
        and name in actual
        and _differ(actual[name], settings[name], actual["channels"])
    ]
    if differences:
        raise CheckpointError(
            f"{path}: is another VAE than model.vae describes: {'; '.join(differences)}. Leave "
            "these keys out to take what the checkpoint says, or give the checkpoint that belongs "
            "to them."
        )
    for name in STATED:
        if name in settings:
            actual.setdefault(name, settings[name])
    if "image_size" not in actual:
        raise ConfigError(
            f"model.vae.image_size: {path} does not tell it, so it has to be given: the side of "
            "the images, in pixels, that the VAE was trained on."
        )
    vae = VAE(**actual)
    load_weights(vae, {"model": weights}, path)
    return vae.eval().requires_grad_(False)


def _vae_weights(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of the VAE in a file, which may hold a whole DALLE."""
    bare = older_names(weights, ())
    for prefix in VAE.prefixes:
        if f"{prefix}codebook.weight" in bare:
            own = re.compile(re.escape(prefix) + r"(?=(?:codebook|encoder|decoder)\.)")
            return {own.sub("", name, 1): value for name, value in bare.items() if own.match(name)}
    raise CheckpointError(
        f"{path}: holds no VAE: it has no codebook.weight, but {', '.join(sorted(bare)[:3])}, ..."
    )


def _shape(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The hyperparameters that names and shapes of the weights tell."""
    first = weights.get("encoder.0.0.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{path}: holds no VAE: its encoder has no first convolution.")
    tokens, width = weights["codebook.weight"].shape

    def count(pattern: str) -> int:
        return sum(bool(re.fullmatch(pattern, name)) for name in weights)

    return {
        "num_tokens": tokens,
        "codebook_dim": width,
        "num_layers": count(r"encoder\.\d+\.0\.weight"),
        "num_resnet_blocks": count(r"encoder\.\d+\.net\.0\.weight"),
        "hidden_dim": first.shape[0],
        "channels": first.shape[1],
    }


def _stated(config: Any) -> dict[str, Any]:
    """What the configuration in a file says of the images; defaults count, as none changed."""
    node = config.get("model") if isinstance(config, Mapping) else None
    if isinstance(node, Mapping) and isinstance(node.get("vae"), Mapping):
        node = node["vae"]
        if "image_size" not in node:
            return {name: node[name] for name in STATED if name in node}
    if not isinstance(node, Mapping):
        return {}
    defaults = inspect.signature(VAE).parameters
    return {name: node.get(name, defaults[name].default) for name in STATED}


def _differ(actual: Any, given: Any, channels: int) -> bool:
    return bool(_comparable(actual, channels) != _comparable(given, channels))


def _comparable(value: Any, channels: int) -> Any:
    """A value such that 1 equals 1.0, a list a tuple, and surplus channels do not count."""
    if isinstance(value, list | tuple):
        return [[float(number) for number in part[:channels]] for part in value]
    return value


def _shown(value: Any) -> str:
    return str(list(map(list, value))) if isinstance(value, tuple) else str(value)
