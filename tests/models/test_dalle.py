from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dalles import TINY_TRANSFORMER, dalle_batch, save_vae, tiny_dalle
from tests.factories import tiny_spec
from vilmedic.datasets.spec import DataSpec
from vilmedic.errors import CheckpointError, ConfigError, DataError
from vilmedic.executors.checkpoint import load_weights
from vilmedic.models.dalle_settings import TransformerSettings


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae.pth")


def test_loss_is_the_weighted_mean_of_text_and_image(vae: Path) -> None:
    result = tiny_dalle(vae, loss_img_weight=3.0)(dalle_batch())
    expected = (result["text_loss"] + 3 * result["image_loss"]) / 4
    torch.testing.assert_close(result["loss"], expected)


def test_the_mask_alone_decides_what_is_padding(vae: Path) -> None:
    model = tiny_dalle(vae)
    ids = torch.tensor([[2, 0, 5, 0, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])

    tokens = model.text_tokens(ids, mask)

    words = 15  # behind them, each position has its own token
    assert tokens.tolist() == [[2, 0, 5, words + 3, words + 4, words + 5]]


def test_word_lists_fill_up_with_a_word(vae: Path) -> None:
    model = tiny_dalle(vae, spec=tiny_spec(6, filler=1))
    ids, mask = torch.tensor([[4, 5, 0]]), torch.tensor([[1, 1, 0]])

    assert model.text_tokens(ids, mask).tolist() == [[4, 5, 1, 1, 1, 1]]
    nothing = model.text_tokens(ids, torch.zeros_like(mask))
    assert nothing.tolist() == [[15, 16, 17, 18, 19, 20]]
    oldest = tiny_dalle(vae, spec=tiny_spec(6, filler=0))  # [PAD] was 0 in the first lists
    assert oldest.text_tokens(ids, mask).tolist() == [[4, 5, 17, 18, 19, 20]]


def test_cached_tokens_equal_images(vae: Path) -> None:
    model, batch = tiny_dalle(vae), dalle_batch()
    tokens = {"image_tokens": model.image_tokens(batch)}
    del batch["index"]
    torch.testing.assert_close(
        model(batch)["loss"], model({**batch, **tokens, "images": None})["loss"]
    )


def test_the_vae_is_frozen_and_all_else_learns(vae: Path) -> None:
    model = tiny_dalle(vae, share_input_output_emb=True)
    model(dalle_batch())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("vae."), name


@pytest.mark.parametrize("options", [{}, {"attn_types": "axial_row", "rotary_emb": False}])
@pytest.mark.slow
def test_compiled_model_gives_the_same(vae: Path, options: dict[str, Any]) -> None:
    model, batch = tiny_dalle(vae, **options), dalle_batch()
    batch["image_tokens"] = model.image_tokens(batch)
    del batch["images"], batch["index"]
    expected = model(batch)["loss"]
    wanted = torch.autograd.grad(expected, model.image_emb.weight)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(batch)["loss"]

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, model.image_emb.weight), wanted)


def test_checkpoints_of_older_versions_get_todays_names(vae: Path) -> None:
    """Version 1.0 nested layers less, and named what vilmedic trained `dalle.`."""
    model, other = tiny_dalle(vae), tiny_dalle(vae, dim_head=12)
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    old = {}
    for name, value in other.state_dict().items():
        name = re.sub(r"(layers\.\d+\.0\.)fn\.fn\.fn\.fn\.fn\.", r"\1fn.fn.fn.", name)
        name = re.sub(r"(layers\.\d+\.1\.)fn\.fn\.fn\.fn\.", r"\1fn.fn.fn.", name)
        old[f"module.dalle.{name}"] = value[:, None, :-1] if name.endswith("pos_emb") else value
        if name.startswith("vae."):
            old[f"module.vae.{name}"] = value

    load_weights(model, {"model": old}, Path("old.pth"))

    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reversible": True}, "activation_checkpointing"),
        ({"stable": True}, "model.dalle.stable"),
        ({"sandwich_norm": True}, "sandwich_norm"),
        ({"shared_attn_ids": [0, 0]}, "shared_attn_ids"),
        ({"attn_types": ["conv_like"]}, "conv_like"),
        ({"attn_types": ["sparse"]}, "sparse"),
        ({"attn_types": ["axial_rwo"]}, "Did you mean 'axial_row'?"),
        ({"dim": 18}, "multiples of 4"),
        ({"dim_head": 4}, "at least 6"),
        ({"null_cond_prob": 1.5}, "0 to 1"),
    ],
)
def test_what_is_not_offered_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        TransformerSettings(**TINY_TRANSFORMER | options)


def test_reports_longer_than_the_text_are_refused(vae: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer_max_len: given 7"):
        tiny_dalle(vae, spec=tiny_spec(7))


def test_vocabularies_have_to_fit(vae: Path) -> None:
    with pytest.raises(ConfigError, match="num_text_tokens: given 10, but the tokenizer has 15"):
        tiny_dalle(vae, num_text_tokens=10)
    with pytest.raises(ConfigError, match=r"dataset\.proto=ImSeq"):
        tiny_dalle(vae, spec=DataSpec())
    model = tiny_dalle(vae)
    assert tiny_dalle(vae, num_text_tokens=40).num_text_tokens == 46
    with pytest.raises(DataError, match="reach from 15 to 15"):
        model.text_tokens(torch.tensor([[15]]), torch.tensor([[1]]))
    batch = dalle_batch() | {"image_tokens": torch.full((3, 16), 24)}
    with pytest.raises(DataError, match="image tokens"):
        model(batch)


def test_images_of_another_size_are_refused(vae: Path) -> None:
    batch = dalle_batch() | {"images": torch.rand(3, 3, 20, 20)}
    with pytest.raises(ConfigError, match="16 x 16 pixels"):
        tiny_dalle(vae)(batch)


def test_a_vae_that_cannot_be_loaded_is_named(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pth"):
        tiny_dalle(tmp_path / "nothing.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(vae.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        tiny_dalle(cut)
