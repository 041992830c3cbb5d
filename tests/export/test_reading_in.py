"""Configuration keys that accept exported folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

import vilmedic
from tests.export import exports
from tests.export.exports import LENGTH, VIT, save_run, simclr
from tests.small_models import WORDS, tiny_cnn, tiny_encoder, tiny_spec, tiny_tokenizer
from vilmedic import cli
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.checkpoints.encoders import read_encoder
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.text import load_tokenizer
from vilmedic.errors import ConfigError
from vilmedic.models.vae import load_vae


def same(given: nn.Module, expected: nn.Module, *, but: str = "-") -> bool:
    """Whether the second network has all weights of the first with the same values."""
    own, other = given.state_dict(), expected.state_dict()
    return all(torch.equal(v, other[name]) for name, v in own.items() if not name.startswith(but))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


def test_image_encoder_of_an_export(made: Path, out: Path, tmp_path: Path) -> None:
    expected = vilmedic.load(made / "run", device="cpu").image_encoder.network
    elsewhere = shutil.copytree(out / "image_encoder", tmp_path / "alone")
    for place in (out, out / "image_encoder", out / "image_encoder/model.safetensors", elsewhere):
        assert same(tiny_cnn(pretrained=str(place)).network, expected), place  # type: ignore[arg-type]
    assert same(tiny_cnn(pretrained=str(out), output_layer="stage3").network, expected)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"pretrained: .* does not fit the backbone"):
        VisionEncoder(backbone="resnet18", pretrained=str(out), read_encoder=read_encoder)
    damage(out / "image_encoder/model.safetensors")
    for place in (out, out / "image_encoder"):
        with pytest.raises(ConfigError, match=r"pretrained: .*safetensors: is damaged"):
            tiny_cnn(pretrained=str(place))


def test_text_encoder_and_tokenizer_of_an_export(made: Path, out: Path) -> None:
    expected: Any = vilmedic.load(made / "run", device="cpu").text_encoder.network
    for place in (str(out), str(out / "text_encoder")):
        tokenizer = load_tokenizer(place)
        assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
        spec = DataSpec(tokenizer=tokenizer, tokenizer_max_len=LENGTH)
        encoder = tiny_encoder_from(spec, proto=place)
        assert same(encoder.network, expected)
        assert same(tiny_encoder(pretrained=place, pooling="mean").network, expected)
    other = DataSpec(tokenizer=tiny_tokenizer(WORDS[::-1]), tokenizer_max_len=LENGTH)
    for place in (str(out), str(out / "text_encoder")):
        with pytest.raises(ConfigError, match=rf"another vocabulary.*tokenizer={out}[^ ]*\."):
            tiny_encoder(other, pretrained=place, pooling="mean")
    damage(out / "text_encoder/model.safetensors")
    for place in (str(out), str(out / "text_encoder")):
        with pytest.raises(ConfigError, match=r"proto: .*safetensors: is damaged"):
            tiny_encoder_from(tiny_spec(), proto=place)
        with pytest.raises(ValueError, match="is damaged"):
            load_tokenizer(place)


def tiny_encoder_from(spec: DataSpec, **settings: Any) -> Any:
    from vilmedic.blocks.text import TextEncoder

    return TextEncoder(spec=spec, pooling="mean", **settings)


def test_a_vision_transformer_of_an_export(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "vit")
    settings = {"output_layer": "last_hidden_state"}
    config = simclr(exports.cnn(str(tmp_path / "vit"), **settings), 16)
    model: Any = save_run(tmp_path / "run", config)
    out = vilmedic.load(tmp_path / "run", device="cpu").export(tmp_path / "out")
    for place in (out, out / "image_encoder"):
        cnn = VisionEncoder(backbone=str(place), pretrained=True, **settings)
        assert same(cnn.network, model.cnn.network)
        cnn = VisionEncoder(
            backbone=str(tmp_path / "vit"),
            pretrained=str(place),
            read_encoder=read_encoder,
            **settings,  # type: ignore[arg-type]
        )
        assert same(cnn.network, model.cnn.network)
    with pytest.raises(ConfigError, match=r"proto: .*has no text_encoder: it is an"):
        tiny_encoder_from(tiny_spec(), proto=str(out))


def test_the_vae_of_an_export(tmp_path: Path) -> None:
    model = save_run(tmp_path / "run", exports.vae())
    out = vilmedic.load(tmp_path / "run", device="cpu").export(tmp_path / "out")
    found = load_vae(out, {"num_tokens": 24})
    assert found.image_size == 16
    assert same(found, model)
    with pytest.raises(ConfigError, match=r"holds no image encoder: it is a checkpoint of VAE"):
        tiny_cnn(pretrained=str(out))


def test_the_embed_command_accepts_an_export(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports.image_file(tmp_path / "a.png")
    rows = {}
    for name in ("run", "out"):
        path = tmp_path / f"{name}.npz"
        words = [str(made / name), "--images", str(tmp_path), "--out", str(path)]
        assert cli.embed(words) == 0, capsys.readouterr().err
        assert cli.embed(words) == 0
        assert "is complete: nothing to do" in capsys.readouterr().out
        rows[name] = torch.from_numpy(np.load(path)["visual"])
    assert torch.equal(rows["run"], rows["out"])
