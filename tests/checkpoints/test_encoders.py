from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from tests.small_models import (
    TINY_BERT,
    WORDS,
    tiny_cnn,
    tiny_convirt,
    tiny_encoder,
    tiny_gloria,
    tiny_simclr,
    tiny_spec,
    tiny_tokenizer,
    tiny_vae,
)
from vilmedic.blocks.pretrained import Filled, network_configs
from vilmedic.blocks.text import WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.checkpoints.checkpoint import save_checkpoint
from vilmedic.checkpoints.encoders import read_encoder
from vilmedic.datasets.aligned import DataSpec
from vilmedic.errors import ConfigError


def save(model: nn.Module, path: Path, spec: DataSpec | None = None, **more: Any) -> Path:
    """Save a best checkpoint, as a run does."""
    said = {"metric": "validation_loss", "better": "lower", "score": 0.5, "seed": 0, "epoch": 0}
    state = {
        "model": model.state_dict(),
        "networks": network_configs(model),
        "config": {"model": {"proto": type(model).__name__}},
        "data": (spec or tiny_spec()).to_plain(),
        "progress": {},
        **said,
        **more,
    }
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(state, path)
    return path


def same(given: nn.Module, expected: nn.Module, *, but: str = "-") -> bool:
    """Whether the second network has all weights of the first with the same values."""
    own, other = given.state_dict(), expected.state_dict()
    return all(torch.equal(v, other[name]) for name, v in own.items() if not name.startswith(but))


@pytest.mark.parametrize("make", [tiny_convirt, tiny_gloria, tiny_simclr])
def test_image_encoder_of_each_system(make: Any, tmp_path: Path) -> None:
    model = make()
    path = save(model, tmp_path / "run" / "0.5_0_0.pth")
    for source in (path, tmp_path / "run"):
        assert same(tiny_cnn(pretrained=str(source)).network, model.cnn.network)
    shorter = tiny_cnn(pretrained=str(path), output_layer="stage3")
    assert same(shorter.network, model.cnn.network), "layers after the output layer are left out"


def test_the_best_checkpoint_of_a_directory_is_used(tmp_path: Path) -> None:
    worse, best = tiny_simclr(), tiny_simclr()
    save(worse, tmp_path / "0.5_0_0.pth")
    save(best, tmp_path / "0.25_1_0.pth", score=0.25)
    save(worse, tmp_path / "last_0.pth")
    assert same(tiny_cnn(pretrained=str(tmp_path)).network, best.cnn.network)
    for path in tmp_path.glob("0*.pth"):
        path.unlink()
    save(worse, tmp_path / "previous_0.pth")
    with pytest.raises(ConfigError, match=r"Name the file: last_0\.pth, previous_0\.pth"):
        tiny_cnn(pretrained=str(tmp_path))


def test_another_backbone_is_refused_with_the_differences(tmp_path: Path) -> None:
    path = str(save(tiny_simclr(), tmp_path / "a.pth"))
    with pytest.raises(ConfigError) as caught:
        tiny_cnn(backbone="resnet18", pretrained=path)
    message = str(caught.value)
    assert message.startswith(f"pretrained: {path} does not fit the backbone: ")
    assert "tensors are missing, such as 'bn1.bias'" in message
    with pytest.raises(ConfigError, match=r"have another shape, such as .*, which is \(.*\) in it"):
        tiny_cnn(backbone="shufflenet_v2_x1_0", pretrained=path)
    shorter = tiny_cnn(output_layer="stage3")
    holder = nn.Module()
    holder.cnn = shorter
    cut = str(save(holder, tmp_path / "cut.pth"))
    with pytest.raises(ConfigError, match=r"are missing, such as 'conv5\.0\.weight'"):
        tiny_cnn(pretrained=cut)


def test_a_system_without_the_encoder_is_an_error(tmp_path: Path) -> None:
    path = str(save(tiny_vae(), tmp_path / "vae.pth"))
    with pytest.raises(ConfigError, match=r"vae\.pth holds no image encoder: .* of VAE\. Allowed"):
        tiny_cnn(pretrained=path)
    path = str(save(tiny_simclr(), tmp_path / "simclr.pth"))
    with pytest.raises(ConfigError, match=r"no text encoder: it is a checkpoint of SimCLR\."):
        tiny_encoder(pretrained=path)
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=r"^pretrained: "):
            tiny_encoder(pretrained=str(wrong))


def words(**settings: Any) -> WordEncoder:
    given = {"last_n_layers": 1, "read_encoder": read_encoder, **TINY_BERT, **settings}
    return WordEncoder(spec=tiny_spec(), **given)


def test_text_encoder_transfers_between_systems(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convirt, gloria = tiny_convirt(), tiny_gloria()
    path = str(save(convirt, tmp_path / "convirt.pth"))
    assert same(tiny_encoder(pretrained=path).network, convirt.encoder.network)
    assert same(words(pretrained=path).text.network, convirt.encoder.network)
    path = str(save(gloria, tmp_path / "gloria.pth"))
    assert not caplog.text
    taken = gloria.encoder.text.network
    assert same(words(pretrained=path).text.network, taken)
    assert same(tiny_encoder(pretrained=path, pooling="mean").network, taken)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        assert same(tiny_encoder(pretrained=path).network, taken, but="pooler.")
    assert "no weights for pooler.dense.bias, pooler.dense.weight; they start at" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_attention_heads", 4, "num_attention_heads is 2 in it and 4 here"),
        ("hidden_act", "relu", "hidden_act is gelu in it and relu here"),
        (
            "intermediate_size",
            4,
            r"another shape, such as 'encoder\.layer\..*\(32,\) in it and \(4,\)",
        ),
        ("num_hidden_layers", 4, r"48 tensors are missing, such as 'encoder\.layer\.1\."),
    ],
)
def test_another_text_encoder_is_refused(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    path = str(save(tiny_convirt(), tmp_path / "a.pth"))
    with pytest.raises(ConfigError, match=message):
        tiny_encoder(pretrained=path, **{field: value})


def test_another_vocabulary_is_refused_with_a_remedy(tmp_path: Path) -> None:
    spec = DataSpec(tokenizer=tiny_tokenizer(WORDS[::-1]), tokenizer_max_len=16)
    run_dir = tmp_path / "run"
    path = save(tiny_convirt(spec), run_dir / "0.5_0_0.pth", spec)
    with pytest.raises(ConfigError) as caught:
        tiny_encoder(pretrained=str(run_dir))
    message = str(caught.value)
    assert f"{path} was trained with another vocabulary: of its 15 words 10 are missing" in message
    assert "tokenizer=<folder>, which vilmedic.load(" in message
    (run_dir / "tokenizer").mkdir()
    with pytest.raises(ConfigError, match=rf"Set tokenizer={run_dir}/tokenizer\."):
        tiny_encoder(pretrained=str(run_dir))
    assert tiny_encoder(spec, pretrained=str(run_dir)).hidden_size == 16


def test_the_remedy_names_the_configured_tokenizer(tmp_path: Path) -> None:
    spec = DataSpec(tokenizer=tiny_tokenizer(WORDS[:5]), tokenizer_max_len=16)
    seq = {"root": "data", "tokenizer": "my/bert"}
    dataset = {"proto": "ImSeq", "image": {"root": "data"}, "seq": seq}
    config = {"model": {"proto": "ConVIRT"}, "dataset": dataset}
    path = save(tiny_convirt(spec), tmp_path / "a.pth", spec, config=config)
    with pytest.raises(ConfigError, match=r"Set tokenizer=my/bert\."):
        tiny_encoder(pretrained=str(path))


def test_older_files_use_the_vocabulary_of_their_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In earlier versions the vocabulary is in the run directory, or unknown."""
    path = str(save(tiny_convirt(), tmp_path / "a.pth", data=None))
    with caplog.at_level(logging.WARNING):
        tiny_encoder(pretrained=path)
    assert "does not hold its vocabulary" in caplog.text
    tiny_tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="another vocabulary"):
        tiny_encoder(pretrained=path)
    damaged = str(save(tiny_convirt(), tmp_path / "b.pth", data={"tokenizer": 3}))
    with pytest.raises(ConfigError, match=r"b\.pth is damaged"):
        tiny_encoder(pretrained=damaged)


def test_a_checkpoint_that_fills_the_model_needs_no_file() -> None:
    assert tiny_cnn(pretrained="gone", filled=Filled()).out_features == 1024
    assert tiny_encoder(pretrained="gone", filled=Filled()).hidden_size == 16
    assert words(pretrained="gone", filled=Filled()).hidden_size == 16


def test_only_the_shape_of_a_published_text_encoder_is_read(tmp_path: Path) -> None:
    settings = {**TINY_BERT, "vocab_size": 4 + len(WORDS)}
    BertModel(BertConfig(**settings)).save_pretrained(tmp_path / "bert")
    model = tiny_convirt()
    path = str(save(model, tmp_path / "a.pth"))
    (tmp_path / "bert" / "model.safetensors").unlink()
    encoder = tiny_encoder(proto=str(tmp_path / "bert"), pretrained=path)
    assert same(encoder.network, model.encoder.network)


def test_image_encoder_of_transformers(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    holder = nn.Module()
    holder.cnn = VisionEncoder(backbone=str(tmp_path / "vit"), pretrained=False)
    path = str(save(holder, tmp_path / "a.pth"))
    cnn = tiny_cnn(
        backbone=str(tmp_path / "vit"), output_layer="last_hidden_state", pretrained=path
    )
    assert same(cnn.network, holder.cnn.network)
    with pytest.raises(ConfigError, match="does not fit the backbone"):
        tiny_cnn(pretrained=path)


def test_image_encoder_of_the_official_gloria(tmp_path: Path) -> None:
    network = models.resnet18(weights=None)
    named: dict[str, Tensor] = {
        f"gloria.img_encoder.model.{name}": value
        for name, value in network.state_dict().items()
        if not name.startswith("fc.")
    }
    torch.save({"state_dict": named, "hyper_parameters": {}}, tmp_path / "gloria.ckpt")
    cnn = tiny_cnn(backbone="resnet18", pretrained=str(tmp_path / "gloria.ckpt"))
    assert same(cnn.network, network)


def test_pretrained_needs_an_encoder_reader() -> None:
    with pytest.raises(ConfigError, match=r"^pretrained: given 'run', but nothing"):
        VisionEncoder(backbone="resnet18", pretrained="run")
