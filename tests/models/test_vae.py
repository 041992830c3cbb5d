from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.older_files import (
    renamed,
    write_dalle_pytorch_dalle,
    write_dalle_pytorch_vae,
    write_first_vilmedic,
    write_vilmedic,
)
from tests.small_models import TINY_VAE, tiny_vae
from vilmedic.checkpoints.checkpoint import load_checkpoint, load_weights, save_checkpoint
from vilmedic.config.load import check_arguments
from vilmedic.errors import CheckpointError, ConfigError, DataError
from vilmedic.models.vae import VAE, load_vae
from vilmedic.registry import MODELS


def images(size: int = 3, side: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.rand(size, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_the_published_name_is_registered() -> None:
    assert MODELS.get("VAE") is VAE


def test_training_gives_a_loss_and_gradients_for_all_weights() -> None:
    model = tiny_vae(kl_div_loss_weight=0.1)
    outputs = model({"images": images()})
    assert set(outputs) == {"loss"}
    outputs["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_evaluation_gives_numbers_per_image() -> None:
    model = tiny_vae(num_resnet_blocks=0).eval()
    batch = {"images": images()}
    with torch.no_grad():
        outputs = model(batch)
    assert outputs["codes"].shape == (3, 16)
    assert outputs["loss"].item() == pytest.approx(outputs["reconstruction_loss"].mean().item())
    for row in range(3):
        one = batch["images"][row : row + 1]
        codes = model.get_codebook_indices(one)
        assert torch.equal(outputs["codes"][row], codes[0])
        decoded = model.decoder(model.codebook(codes).transpose(1, 2).unflatten(2, (4, 4)))
        error = (decoded - (one - 0.5) / 0.5).square().mean()
        torch.testing.assert_close(outputs["hard_reconstruction_loss"][row, 0], error)


def test_the_kl_divergence_is_a_mean_over_images() -> None:
    """Repeating the images of a batch does not double the loss, unlike in dalle-pytorch."""
    model = tiny_vae(kl_div_loss_weight=1.0)
    noise = torch.randn(3, 16, model.num_tokens)
    once, _ = model.objective(images(), noise)
    twice, _ = model.objective(images().repeat(2, 1, 1, 1), noise.repeat(2, 1, 1))
    torch.testing.assert_close(once, twice)
    without, _ = tiny_vae().objective(images(), noise)
    assert once > without + 0.1


def test_decoded_images_have_the_grey_levels_of_the_originals() -> None:
    """With a decoder that returns its input: 0.8 must be decoded as 0.8."""
    model = tiny_vae(num_layers=1, num_resnet_blocks=0, codebook_dim=1, hidden_dim=1, channels=1)
    level = 0.8
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder[-1].bias.fill_((level - 0.5) / 0.5)
    decoded = model.decode(torch.zeros(2, 64, dtype=torch.int64))
    assert decoded.shape == (2, 1, 16, 16)
    torch.testing.assert_close(decoded, torch.full_like(decoded, level))
    with torch.no_grad():
        model.decoder[-1].bias.fill_(3.0)
    assert model.decode(torch.zeros(1, 64, dtype=torch.int64)).unique().tolist() == [1.0]


def test_codes_are_in_row_major_order() -> None:
    model = tiny_vae(num_resnet_blocks=0)
    codes = torch.zeros(1, 16, dtype=torch.int64)
    plain = model.decode(codes)
    codes[0, 2] = 5  # first row, third column of 4 x 4
    rows, columns = torch.where((model.decode(codes) != plain)[0].any(dim=0))
    assert (int(rows.min()), int(columns.min())) == (0, 5)
    assert (int(rows.max()), int(columns.max())) == (6, 14)


def test_a_reconstruction_decodes_the_codes() -> None:
    model = tiny_vae()
    expected = model.decode(model.get_codebook_indices(images()))
    assert torch.equal(model.reconstruct(images()), expected)


def test_one_channel_is_the_mean_of_three() -> None:
    model = tiny_vae(channels=1, normalization=None).eval()
    grey = images(channels=1)
    with torch.no_grad():
        three = model({"images": grey.expand(-1, 3, -1, -1)})
        one = model({"images": grey})
    assert torch.equal(three["codes"], one["codes"])
    assert torch.equal(model.reconstruct(grey.expand(-1, 3, -1, -1)), model.reconstruct(grey))


def test_the_temperature_is_a_function_of_the_step() -> None:
    model = tiny_vae(temperature=1.0, temperature_rate=0.01, temperature_end=0.5)
    assert model.schedule(1) == {"temperature": 1.0}
    assert model.schedule(51)["temperature"] == pytest.approx(math.exp(-0.5))
    assert model.schedule(1000) == {"temperature": 0.5}
    assert model.temperature == 0.5
    assert model.schedule(1) == {"temperature": 1.0}  # independent of earlier steps
    assert tiny_vae().schedule(10**6) == {"temperature": 0.9}


def test_the_temperature_is_used() -> None:
    model = tiny_vae(temperature=1.0, temperature_rate=1.0, temperature_end=0.01)
    noise = torch.randn(3, 16, model.num_tokens)
    warm, _ = model.objective(images(), noise)
    model.schedule(100)
    cold, _ = model.objective(images(), noise)
    expected, _ = tiny_vae(temperature=0.01).objective(images(), noise)
    assert warm != cold
    torch.testing.assert_close(cold, expected)


def test_reduced_precision_has_a_loss_in_float32() -> None:
    model = tiny_vae()
    torch.manual_seed(0)
    exact = model({"images": images()})["loss"]
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model({"images": images()})["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_codes_and_decoded_images_do_not_depend_on_training_precision() -> None:
    model, batch = tiny_vae(num_tokens=300), images(8)
    codes = model.get_codebook_indices(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.get_codebook_indices(batch), codes)
        decoded = model.decode(codes)
    torch.testing.assert_close(decoded, model.decode(codes), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 60, "num_layers": 3}, r"image_size: given 60.*multiple of 8.*56 or 64"),
        ({"image_size": 4, "num_layers": 3}, r"image_size: given 4.*Nearest: 8"),
        ({"temperature_end": 1.5}, r"temperature_end: given 1\.5.*temperature=0\.9"),
        ({"normalization": [[0.5], [0.5]]}, r"normalization: given.*two lists of 3 numbers"),
        ({"normalization": [[0.5] * 3, [0.5, 0.5, 0]]}, r"normalization: given"),
    ],
)
def test_invalid_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_vae(**settings)


def test_reinmax_without_straight_through_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reinmax: .*no effect unless straight_through is true"):
        check_arguments(VAE, {"reinmax": True})


def test_images_of_wrong_size_or_channels_are_refused() -> None:
    model = tiny_vae()
    with pytest.raises(ConfigError, match=r"image_size=16.*are 32 x 32 pixels"):
        model({"images": images(side=32)})
    with pytest.raises(ConfigError, match=r"dataset\.proto=ImageDataset"):
        model({"input_ids": torch.zeros(1, 2)})
    with pytest.raises(ConfigError, match=r"views=1"):
        model({"images": torch.zeros(2, 2, 3, 16, 16)})
    with pytest.raises(ConfigError, match=r"channels=3, but the images have 4"):
        model({"images": torch.zeros(2, 4, 16, 16)})


def test_codes_of_another_codebook_are_refused() -> None:
    with pytest.raises(DataError, match=r"0 to 12.*has 12"):
        tiny_vae().decode(torch.arange(16)[None].clamp(max=12))
    with pytest.raises(DataError, match="15 codes do not fill a square"):
        tiny_vae().decode(torch.zeros(1, 15, dtype=torch.int64))


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
    load_vae(tmp_path / "a.pth", same)  # values beyond the number of channels are ignored


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
    assert "a.pth: is another VAE than the section vae describes" in text
    assert "image_size is 16, the configuration says 32" in text
    assert "num_tokens is 12, the configuration says 8192" in text
    assert "num_resnet_blocks is 1, the configuration says 0" in text
    assert "normalization is [[0.5" in text
    assert "hidden_dim" not in text


def test_the_best_checkpoint_of_a_run_directory_is_used(tmp_path: Path) -> None:
    for seed, name in enumerate(("0.5_0_1.pth", "0.25_1_1.pth", "last_1.pth")):
        own(tmp_path / name, tiny_vae(seed=seed))
    best = tiny_vae(seed=1).state_dict()
    assert torch.equal(load_vae(tmp_path, {}).codebook.weight, best["codebook.weight"])


def test_the_size_of_images_must_be_given(tmp_path: Path) -> None:
    write_first_vilmedic(tmp_path / "a.pth", tiny_vae())
    with pytest.raises(ConfigError, match=r"vae\.image_size: .*a\.pth does not contain it"):
        load_vae(tmp_path / "a.pth", {})
    assert load_vae(tmp_path / "a.pth", {"image_size": 64}).grid == 16


def test_a_file_without_a_vae_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"cnn.weight": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: holds no VAE.*cnn\.weight"):
        load_vae(tmp_path / "a.pth", {})
    torch.save({"model": {"codebook.weight": torch.ones(2, 2)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: holds no VAE.*encoder"):
        load_vae(tmp_path / "a.pth", {})
    with pytest.raises(ConfigError, match=r"vae\.ckpt: there is no "):
        load_vae(tmp_path / "b.pth", {})


def test_missing_weights_are_named(tmp_path: Path) -> None:
    weights = tiny_vae().state_dict()
    weights.pop("decoder.0.bias")
    torch.save({"hparams": HPARAMS, "weights": weights}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"file lacks \(1\): decoder\.0\.bias"):
        load_vae(tmp_path / "a.pth", {})
