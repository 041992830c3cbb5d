"""Checkpoints of older projects in the shape and the names of this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vilmedic.errors import CheckpointError

WRAPPERS = ("module.", "_orig_mod.")
"""What data-parallel training and torch.compile put in front of the names of weights."""


def unify(contents: Any, path: Path) -> dict[str, Any]:
    """A checkpoint as `{"model": weights, "config": configuration, ...}`.

    Understood are this project's own and those of the original vilmedic, which have this shape,
    dalle-pytorch's training files (`hparams`, `vae_params`, `weights`), and weights alone.

    Args:
        contents: what `load_plain` returned.
        path: the file, for messages.

    Returns:
        `config` holds what the file says of the model under `model`, in the keys of a
        configuration; there is none with weights alone.

    Raises:
        CheckpointError: there are no weights in it.
    """
    if _are_weights(contents):
        return {"model": contents}
    if not isinstance(contents, dict) or not ("model" in contents or "weights" in contents):
        raise CheckpointError(f"{path}: not a checkpoint: it has neither 'model' nor 'weights'.")
    if "model" not in contents:
        hparams = contents.get("hparams") or {}
        if "vae_params" in contents:
            hparams = {"dalle": hparams, "vae": contents["vae_params"] or {}}
        contents = {"model": contents["weights"], "config": {"model": hparams}}
    if not _are_weights(contents["model"]):
        what = contents["model"]
        shown = what if isinstance(what, str) else type(what).__name__
        raise CheckpointError(f"{path}: there are no weights in it, but: {shown}")
    return contents


def older_names(
    weights: Mapping[str, Tensor], wanted: Sequence[str], prefixes: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Weights under the names of today.

    Args:
        weights: weights by their names in a file.
        wanted: the names that a model has.
        prefixes: what older formats may have put in front of them, nearest format first.

    Returns:
        The wanted weights, when all of them are there with one of the prefixes; otherwise all
        weights without what training wrapped around them.
    """
    bare = dict(weights)
    while wrapper := next((w for w in WRAPPERS if all(n.startswith(w) for n in bare)), None):
        bare = {name.removeprefix(wrapper): value for name, value in bare.items()}
    for prefix in prefixes:
        if all(prefix + name in bare for name in wanted):
            return {name: bare[prefix + name] for name in wanted}
    return bare


def _are_weights(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(inner, Tensor) for inner in value.values())
    )
