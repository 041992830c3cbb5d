from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vilmedic.checkpoints.older_formats import older_names, unify
from vilmedic.errors import CheckpointError

PATH = Path("some.pth")
W = torch.zeros(1)


@pytest.mark.parametrize(
    ("contents", "config"),
    [
        ({"a": W}, None),
        ({"model": {"a": W}, "config": {"model": {"x": 1}}, "epoch": 3}, {"model": {"x": 1}}),
        ({"hparams": {"x": 1}, "weights": {"a": W}}, {"model": {"x": 1}}),
        (
            {"hparams": {"x": 1}, "vae_params": {"y": 2}, "weights": {"a": W}, "epoch": 3},
            {"model": {"dalle": {"x": 1}, "vae": {"y": 2}}},
        ),
        (
            {"hparams": {"x": 1}, "vae_params": None, "weights": {"a": W}},
            {"model": {"dalle": {"x": 1}, "vae": {}}},
        ),
    ],
)
def test_every_format_is_converted(contents: dict[str, Any], config: Any) -> None:
    state = unify(contents, PATH)
    assert list(state["model"]) == ["a"]
    assert state.get("config") == config


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"epoch": 3}, r"some\.pth: not a checkpoint: it has neither"),
        ([W], "not a checkpoint"),
        ({"hparams": {}, "weights": "look into consolidating"}, "but: look into consolidating"),
        ({"model": {"a": 3}}, "no weights in it, but: dict"),
    ],
)
def test_a_file_without_weights_is_refused(contents: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unify(contents, PATH)


@pytest.mark.parametrize(
    "wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("prefix", ["", "vae.", "vae.vae."])
def test_prefixes_of_weight_names_are_removed(wrapper: str, prefix: str) -> None:
    given = {f"{wrapper}{prefix}{name}": W + i for i, name in enumerate(("a.weight", "b.bias"))}
    found = older_names(given, ["a.weight", "b.bias"], ("", "vae.", "vae.vae."))
    assert found == {"a.weight": W, "b.bias": W + 1}


def test_unknown_weight_names_are_unchanged() -> None:
    assert list(older_names({"module.c": W}, ["a"], ("", "vae."))) == ["c"]
    assert list(older_names({"module.a": W, "b": W}, ["a", "b"], ("",))) == ["module.a", "b"]
    assert older_names({}, ["a"], ("",)) == {}
