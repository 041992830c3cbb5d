from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.factories import TINY_VAE, tiny_vae
from tests.older_files import (
    renamed,
    write_dalle_pytorch_dalle,
    write_dalle_pytorch_vae,
    write_first_vilmedic,
    write_vilmedic,
)
from vilmedic.checkpoints.checkpoint import load_checkpoint, load_weights, save_checkpoint
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.models.vae import VAE
from vilmedic.models.vae_checkpoint import load_vae

HPARAMS = {**TINY_VAE, "channels": 3}


def own(path: Path, model: VAE) -> None:
    config = {"model": {"proto": "VAE", **TINY_VAE}}
    save_checkpoint({"model": model.state_dict(), "config": config, "epoch": 1}, path)


def whole_dalle(path: Path, model: VAE) -> None:
    weights = {**renamed(model.state_dict(), "vae."), "transformer.x": torch.zeros(1)}
    write_dalle_pytorch_dalle(path, weights, hparams={"dim": 4}, vae_params=HPARAMS)


def vilmedic_dalle(path: Path, model: VAE) -> None:
    weights = model.state_dict()
    twice = {**renamed(weights, "vae.vae."), **renamed(weights, "dalle.vae.")}
    config = {"model": {"proto": "DALLE", "vae": {**TINY_VAE, "ckpt": "x.pth"}, "dalle": {}}}
    torch.save({"model": {**twice, "dalle.text_emb.weight": torch.ones(2)}, "config": config}, path)


WRITERS: dict[str, Callable[[Path, VAE], None]] = {
    "own": own,
    "vilmedic": lambda path, model: write_vilmedic(path, model, TINY_VAE),
    "vilmedic on several GPUs": lambda path, model: write_vilmedic(
        path, model, TINY_VAE, prefix="module.vae."
    ),
    "first vilmedic": write_first_vilmedic,
    "dalle-pytorch": lambda path, model: write_dalle_pytorch_vae(path, model, HPARAMS),
    "inside a DALLE of dalle-pytorch": whole_dalle,
    "inside a DALLE of vilmedic": vilmedic_dalle,
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))
def test_every_format_gives_the_same_vae(
    writer: Callable[[Path, VAE], None], tmp_path: Path
) -> None:
    trained, path = tiny_vae(seed=3), tmp_path / "vae.pth"
    writer(path, trained)
    loaded = load_vae(path, {"image_size": 16, "temperature": 0.3})
    images = torch.rand(2, 3, 16, 16)
    codes = trained.get_codebook_indices(images)
    assert torch.equal(loaded.get_codebook_indices(images), codes)
    assert torch.equal(loaded.decode(codes), trained.decode(codes))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in TINY_VAE.items():
        assert getattr(loaded, name) == value


@pytest.mark.parametrize("name", [name for name in WRITERS if "inside" not in name])
def test_every_format_can_be_evaluated(name: str, tmp_path: Path) -> None:
    trained, path = tiny_vae(seed=3), tmp_path / "vae.pth"
    WRITERS[name](path, trained)
    model = tiny_vae(seed=4)
    load_weights(model, load_checkpoint(path), path)
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_hyperparameters_come_from_the_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**TINY_VAE, "normalization": [[0.4] * 3, [0.2] * 3]}
    trained = tiny_vae(**settings)
    config = {"model": {"proto": "VAE", **settings}}
    save_checkpoint({"model": trained.state_dict(), "config": config}, tmp_path / "a.pth")
    loaded = load_vae(tmp_path / "a.pth", {})
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.reconstruct(images), trained.reconstruct(images))
    same = {"normalization": [[0.4] * 4, [0.2] * 4], "num_tokens": 12}
    load_vae(tmp_path / "a.pth", same)  # numbers beyond the channels do not count


def test_all_differences_are_listed_at_once(tmp_path: Path) -> None:
    own(tmp_path / "a.pth", tiny_vae())
    given = {
        "image_size": 32,
        "num_tokens": 8192,
        "hidden_dim": 8,
        "num_resnet_blocks": 0,
        "normalization": [[0.0] * 3, [1.0] * 3],
    }
    with pytest.raises(CheckpointError) as caught:
        load_vae(tmp_path / "a.pth", given)
    text = str(caught.value)
    assert "a.pth: is another VAE than model.vae describes" in text
    assert "image_size is 16, the configuration says 32" in text
    assert "num_tokens is 12, the configuration says 8192" in text
    assert "num_resnet_blocks is 1, the configuration says 0" in text
    assert "normalization is [[0.5" in text
    assert "hidden_dim" not in text


def test_the_best_checkpoint_of_a_run_directory_is_taken(tmp_path: Path) -> None:
    for seed, name in enumerate(("0.5_0_1.pth", "0.25_1_1.pth", "last_1.pth")):
        own(tmp_path / name, tiny_vae(seed=seed))
    best = tiny_vae(seed=1).state_dict()
    assert torch.equal(load_vae(tmp_path, {}).codebook.weight, best["codebook.weight"])


def test_the_size_of_images_must_be_told_by_someone(tmp_path: Path) -> None:
    write_first_vilmedic(tmp_path / "a.pth", tiny_vae())
    with pytest.raises(ConfigError, match=r"model\.vae\.image_size: .*a\.pth does not tell it"):
        load_vae(tmp_path / "a.pth", {})
    assert load_vae(tmp_path / "a.pth", {"image_size": 64}).grid == 16


def test_a_file_without_a_vae_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"cnn.weight": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: holds no VAE.*cnn\.weight"):
        load_vae(tmp_path / "a.pth", {})
    torch.save({"model": {"codebook.weight": torch.ones(2, 2)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: holds no VAE.*encoder"):
        load_vae(tmp_path / "a.pth", {})
    with pytest.raises(CheckpointError, match=r"model\.vae\.ckpt: there is no "):
        load_vae(tmp_path / "b.pth", {})


def test_missing_weights_are_named(tmp_path: Path) -> None:
    weights = tiny_vae().state_dict()
    weights.pop("decoder.0.bias")
    torch.save({"hparams": HPARAMS, "weights": weights}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"file lacks \(1\): decoder\.0\.bias"):
        load_vae(tmp_path / "a.pth", {})
