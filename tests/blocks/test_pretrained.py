from __future__ import annotations

import ast
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

import vilmedic
from tests.small_models import TINY_BERT, tiny_batch, tiny_spec
from vilmedic.blocks.pretrained import load_config, network_configs
from vilmedic.blocks.text import TextEncoder, WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.load import check_arguments
from vilmedic.datasets.text import load_tokenizer
from vilmedic.errors import CheckpointError, ConfigError

VOCABULARY = tiny_spec().vocab_size
HALF = [torch.float16, torch.bfloat16]


def saved(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> str:
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**TINY_BERT, vocab_size=VOCABULARY))


def vit(size: int = 32) -> ViTModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {**TINY_BERT, "image_size": size, "patch_size": 8}
    del settings["max_position_embeddings"]
    return ViTModel(ViTConfig(**settings))


def t5() -> T5Model:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5Model(T5Config(**sizes, vocab_size=VOCABULARY))


def bart() -> BartModel:
    torch.manual_seed(0)
    both = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
    sizes = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in both.items()}
    config = BartConfig(**sizes, d_model=16, vocab_size=VOCABULARY, max_position_embeddings=64)
    return BartModel(config)


def text(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("dtype", HALF)
def test_weights_stored_in_16_bit_are_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    proto = saved(tmp_path / "bert", bert(), dtype)
    backbone = saved(tmp_path / "vit", vit(), dtype)
    encoder = TextEncoder(spec=tiny_spec(), proto=proto)
    images = [VisionEncoder(backbone=backbone, pretrained=given) for given in (True, False)]
    for module in (encoder, *images):
        assert {value.dtype for value in module.parameters()} == {torch.float32}
    stored = bert().to(dtype).embeddings.word_embeddings.weight.float()
    assert torch.equal(encoder.network.embeddings.word_embeddings.weight, stored)
    assert encoder.eval()(**text(tiny_batch())).dtype == torch.float32
    with pytest.raises(ConfigError, match=r"^dtype: weights are float32 here"):
        TextEncoder(spec=tiny_spec(), proto=proto, dtype="float16")


@pytest.mark.parametrize("make", [t5, bart])
@torch.inference_mode()
def test_an_encoder_decoder_gives_its_encoder(tmp_path: Path, make: Any) -> None:
    whole = make().eval()
    proto = saved(tmp_path, whole)
    batch = text(tiny_batch())
    encoder = TextEncoder(spec=tiny_spec(), proto=proto, pooling="cls").eval()
    expected = whole.get_encoder()(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(**batch), expected)
    assert encoder.hidden_size == 16
    assert not [name for name, _ in encoder.named_parameters() if "decoder" in name]
    words = WordEncoder(spec=tiny_spec(), proto=proto, last_n_layers=2).eval()
    assert words(**batch, word_ids=tiny_batch()["word_ids"]).words.shape == (4, 16, 16)
    with pytest.raises(ConfigError, match=r"has no pooler. Allowed: cls, mean, max"):
        TextEncoder(spec=tiny_spec(), proto=proto)


def test_an_encoder_decoder_learns(tmp_path: Path) -> None:
    encoder = TextEncoder(spec=tiny_spec(), proto=saved(tmp_path, t5()), pooling="mean")
    encoder(**text(tiny_batch())).sum().backward()
    assert all(value.grad is not None for value in encoder.parameters())


def test_a_model_that_needs_more_than_text_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**sizes, **layers, vocab_size=VOCABULARY).to_dict(),
        vision_config=CLIPVisionConfig(**sizes, **layers, image_size=32, patch_size=8).to_dict(),
        projection_dim=8,
    )
    proto = saved(tmp_path, CLIPModel(config))
    with pytest.raises(ConfigError, match=r"^proto: "):
        TextEncoder(spec=tiny_spec(), proto=proto, pooling="cls")
    with pytest.raises(ConfigError, match=r"^backbone: .* does not take images alone"):
        VisionEncoder(backbone=proto)


@pytest.mark.parametrize("size", [24, 32, 48])
@torch.inference_mode()
def test_images_of_another_size_than_in_pretraining(tmp_path: Path, size: int) -> None:
    model = vit().eval()
    encoder = VisionEncoder(backbone=saved(tmp_path, model), output_layer="pooler_output").eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = model(images, interpolate_pos_encoding=size != 32).pooler_output
    torch.testing.assert_close(encoder.pooled(images), expected)


def test_an_unsupported_size_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionEncoder(backbone=saved(tmp_path, vit()))
    monkeypatch.setattr(encoder.source, "interpolates", False)
    message = r"does not take images of 48 x 48 pixels.*made for 32 x 32: set the crop"
    with pytest.raises(ConfigError, match=message):
        encoder(torch.zeros(1, 3, 48, 48))


def test_a_model_for_any_size_needs_no_interpolation(tmp_path: Path) -> None:
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    encoder = VisionEncoder(backbone=saved(tmp_path, SwinModel(config))).eval()
    assert encoder.pooled(torch.zeros(2, 3, 48, 48)).shape == (2, 16)


def with_own_code(folder: Path) -> tuple[str, Path]:
    """Save a text encoder that asks for Python code beside it, which would create a file."""
    folder.mkdir()
    trace = folder / "executed"
    code = f"open({str(trace)!r}, 'w').close()\nfrom transformers import BertConfig as OwnConfig\n"
    (folder / "own.py").write_text(code)
    own = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    settings = {"model_type": "own-bert", "auto_map": own, **TINY_BERT}
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder), trace


def test_python_code_of_a_model_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append("y") or "y")
    name, trace = with_own_code(tmp_path / "own")
    for build, key in (
        (lambda: TextEncoder(spec=tiny_spec(), proto=name), "proto"),
        (lambda: VisionEncoder(backbone=name), "backbone"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key}: .*never executed.*nothing of it"):
            build()
    (Path(name) / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"its tokenizer can be used.*takes tokenizer="):
        TextEncoder(spec=tiny_spec(), proto=name)
    assert not trace.exists()
    assert asked == []


def cxr_bert(folder: Path, *, tokenizer: bool = False) -> BertForMaskedLM:
    """Save a folder like that of BioViL's text encoder; its Python code would raise an error."""
    folder.mkdir()
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**TINY_BERT, vocab_size=VOCABULARY))
    weights = dict(model.state_dict())
    weights["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    for name, shape in (("dense_to_hidden", (8, 16)), ("dense_to_output", (8, 8))):
        weights[f"cls_projection_head.{name}.weight"] = torch.ones(shape)
    torch.save(weights, folder / "pytorch_model.bin")
    own = "configuration_cxrbert.CXRBert"
    settings = {
        **model.config.to_dict(),
        "model_type": "cxr-bert",
        "architectures": ["CXRBertModel"],
        "projection_size": 8,
        "torch_dtype": "float32",
        "auto_map": {"AutoConfig": f"{own}Config", "AutoModel": "modeling_cxrbert.CXRBertModel"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("configuration_cxrbert.py", "modeling_cxrbert.py"):
        (folder / name).write_text("raise RuntimeError('this must not run')\n")
    if tokenizer:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "acute", "effusion"]
        (folder / "vocab.txt").write_text("\n".join(words))
        reader = {"AutoTokenizer": [f"{own}Tokenizer", None]}
        settings = {"tokenizer_class": "CXRBertTokenizer", "auto_map": reader}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model.eval()


@torch.inference_mode()
def test_cxr_bert_loads_its_bert_without_running_its_python(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = cxr_bert(tmp_path / "cxr")
    with caplog.at_level(logging.INFO, "vilmedic"):
        encoder = TextEncoder(spec=tiny_spec(), proto=str(tmp_path / "cxr"), pooling="cls").eval()
    assert "is a cxr-bert: its bert body is used, without its heads and its Python" in caplog.text
    batch = text(tiny_batch())
    expected = whole.bert(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(**batch), expected, rtol=0, atol=1e-5)
    assert sorted(dict(encoder.named_parameters())) == sorted(
        f"network.{name}" for name, _ in whole.bert.named_parameters()
    )
    stated = network_configs(encoder)["network"]
    assert stated["model_type"] == "bert"
    assert not {"auto_map", "projection_size"} & stated.keys()


def test_cxr_bert_has_the_settings_of_bert(tmp_path: Path) -> None:
    cxr_bert(tmp_path / "cxr")
    proto = str(tmp_path / "cxr")
    check_arguments(TextEncoder, {"proto": proto, "hidden_dropout_prob": 0.2})
    with pytest.raises(ConfigError, match="Did you mean 'hidden_dropout_prob'"):
        check_arguments(TextEncoder, {"proto": proto, "hidden_dropout": 0.2})
    encoder = TextEncoder(spec=tiny_spec(), proto=proto, pooling="cls", hidden_dropout_prob=0.2)
    assert encoder.network.embeddings.dropout.p == 0.2


def test_the_vocabulary_of_cxr_bert(tmp_path: Path) -> None:
    cxr_bert(tmp_path / "cxr", tokenizer=True)
    tokenizer = load_tokenizer(str(tmp_path / "cxr"))
    assert tokenizer("No acute effusion")["input_ids"] == [2, 5, 6, 7, 3]
    assert tokenizer.pad_token == "[PAD]"


@pytest.mark.parametrize("config", [{}, {"model_type": 3}, {"model_type": "bert", "pad": 1j}])
def test_damaged_network_settings_are_an_error(config: dict[str, Any]) -> None:
    config = {**config, "hidden_size": "wide"}
    with pytest.raises(CheckpointError, match=r"^proto: .* is damaged: "):
        load_config("proto", "gone", {}, config)


def test_trust_remote_code_is_false_in_every_call() -> None:
    """Every call that reads a folder or the hub sets it: the default is to ask."""
    found = []
    for path in Path(vilmedic.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("from_pretrained", "from_config"):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                found.append((path.name, ast.unparse(given.get("trust_remote_code", node))))
    assert len(found) >= 6
    assert {value for _, value in found} == {"False"}, found
