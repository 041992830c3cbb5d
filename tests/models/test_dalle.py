from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_dalles import TINY_TRANSFORMER, TINY_VAE, dalle_batch, save_vae, tiny_dalle
from tests.small_models import tiny_spec
from vilmedic.checkpoints.checkpoint import load_weights
from vilmedic.datasets.aligned import DataSpec
from vilmedic.errors import CheckpointError, ConfigError, DataError
from vilmedic.models.dalle import DALLE
from vilmedic.models.dalle_settings import FrozenVAE, TransformerSettings
from vilmedic.models.vae import VAE


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae.pth")


def test_loss_is_the_weighted_mean_of_text_and_image(vae: Path) -> None:
    result = tiny_dalle(vae, loss_img_weight=3.0)(dalle_batch())
    expected = (result["text_loss"] + 3 * result["image_loss"]) / 4
    torch.testing.assert_close(result["loss"], expected)


def test_only_the_mask_decides_what_is_padding(vae: Path) -> None:
    model = tiny_dalle(vae)
    ids = torch.tensor([[2, 0, 5, 0, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])

    tokens = model.text_tokens(ids, mask)

    words = 15  # after them, each position has its own padding token
    assert tokens.tolist() == [[2, 0, 5, words + 3, words + 4, words + 5]]


def test_word_list_tokenizers_pad_with_a_word(vae: Path) -> None:
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


def test_the_vae_is_frozen_and_the_rest_is_trained(vae: Path) -> None:
    model = tiny_dalle(vae, share_input_output_emb=True)
    model(dalle_batch())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("vae."), name


@pytest.mark.parametrize("options", [{}, {"attn_types": "axial_row", "rotary_emb": False}])
@pytest.mark.slow
def test_compiled_model_gives_the_same_results(vae: Path, options: dict[str, Any]) -> None:
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


def changed(model: DALLE) -> DALLE:
    """A model with changed weights, as after training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    return model


def in_old_names(model: DALLE) -> dict[str, torch.Tensor]:
    """The weights of a model with token shift, with the names before version 1.4."""
    deep = re.compile(r"(layers\.\d+\.[01]\.)(?:fn\.){4,5}")
    return {deep.sub(r"\1fn.fn.fn.", name): value for name, value in model.state_dict().items()}


def test_older_weight_names_are_converted(vae: Path) -> None:
    """Version 1.0 nested layers less, and vilmedic added the prefix `dalle.`."""
    model, other = tiny_dalle(vae), changed(tiny_dalle(vae))
    old = {}
    for name, value in in_old_names(other).items():
        old[f"module.dalle.{name}"] = value[:, None, :-1] if name.endswith("pos_emb") else value
        if name.startswith("vae."):
            old[f"module.vae.{name}"] = value

    load_weights(model, {"model": old}, Path("old.pth"))

    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_token_shift_is_detected_in_older_weight_names(vae: Path) -> None:
    shifting, still = tiny_dalle(vae), tiny_dalle(vae, shift_tokens=False)
    files = {
        "shifts": shifting.state_dict(),
        "shifts, old": in_old_names(shifting),
        "still": still.state_dict(),
        "still, old": {
            k.replace(".0.fn.fn.fn.", ".0.fn.fn."): v for k, v in still.state_dict().items()
        },
    }
    fits = {"shifts": shifting, "shifts, old": shifting, "still": still, "still, old": still}
    for name, weights in files.items():
        for model in (shifting, still):
            if fits[name] is model:
                load_weights(model, {"model": weights}, Path("x.pth"))
                continue
            with pytest.raises(CheckpointError, match="does not fit"):
                load_weights(model, {"model": weights}, Path("x.pth"))


@pytest.mark.parametrize(
    ("options", "stated", "words"),
    [
        ({"heads": 3, "dim_head": 8}, {}, ["heads is 2, the configuration says 3", "dim_head is"]),
        ({"attn_types": ["axial_row"]}, {}, ["attn_types is ['full', 'full'], the"]),
        ({"shift_tokens": False}, {"shift_tokens": True}, ["shift_tokens is True"]),
        ({}, {"shift_tokens": False}, ["shift_tokens is False"]),
        ({"rotary_emb": False}, {"rotary_emb": True}, ["rotary_emb is True"]),
        ({"text_seq_len": 8}, {}, ["text_seq_len is 6, the configuration says 8"]),
        ({"num_text_tokens": 17}, {"num_text_tokens": 15}, ["num_text_tokens is 15"]),
        ({"share_input_output_emb": True}, {"share_input_output_emb": False}, ["share_input"]),
        ({}, {"stable": True}, ["stable is True, but the stabilised softmax"]),
        ({}, {"attn_types": ["full", "conv_like"]}, ["['full', 'conv_like']"]),
    ],
)
def test_a_checkpoint_of_another_transformer_is_refused(
    vae: Path, options: dict[str, Any], stated: dict[str, Any], words: list[str]
) -> None:
    weights = tiny_dalle(vae).state_dict()
    state = {"model": weights, "config": {"model": {"dalle": TINY_TRANSFORMER | stated}}}
    model = tiny_dalle(vae, **options)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state, Path("dalle.pth"))
    for text in ("dalle.pth: is of another model", *words):
        assert text in str(caught.value)


def test_equivalent_settings_are_no_difference(vae: Path) -> None:
    stated = {"attn_types": ("full",), "num_text_tokens": None, "stable": False, "depth": 2}
    config = {"model": {"dalle": TINY_TRANSFORMER | stated}}
    other = changed(tiny_dalle(vae))
    model = tiny_dalle(vae)
    load_weights(model, {"model": other.state_dict(), "config": config}, Path("x.pth"))
    assert torch.equal(model.text_emb.weight, other.text_emb.weight)


@pytest.mark.parametrize(
    "options", [{"heads": 3, "dim_head": 8}, {"text_seq_len": 4, "num_text_tokens": 17}]
)
def test_weight_only_files_are_checked_by_position_embeddings(
    vae: Path, options: dict[str, Any]
) -> None:
    longest = options.get("text_seq_len", 6)
    model = tiny_dalle(vae, spec=tiny_spec(longest), **options)
    with pytest.raises(CheckpointError, match="pos_emb"):
        load_weights(model, {"model": tiny_dalle(vae).state_dict()}, Path("x.pth"))
    weights = tiny_dalle(vae).state_dict()
    weights["transformer.pos_emb"] = weights["transformer.pos_emb"] + 1
    with pytest.raises(CheckpointError, match=r"the positions .* are others"):
        load_weights(tiny_dalle(vae), {"model": weights}, Path("x.pth"))


def test_a_checkpoint_with_another_vae_is_refused(vae: Path, tmp_path: Path) -> None:
    trained = tiny_dalle(vae)
    state = {"model": trained.state_dict()}
    torch.manual_seed(9)
    torch.save({"model": VAE(**TINY_VAE).state_dict()}, tmp_path / "other.pth")
    torch.save(state, tmp_path / "dalle.pth")
    settings = FrozenVAE(ckpt=str(tmp_path / "other.pth"), image_size=16)
    model = DALLE(spec=tiny_spec(6), vae=settings, dalle=trained.settings)
    with pytest.raises(CheckpointError, match=r"dalle\.pth: .*VAE is another one.*other\.pth"):
        load_weights(model, state, tmp_path / "dalle.pth")

    settings = FrozenVAE(ckpt=str(tmp_path / "dalle.pth"), image_size=16)
    model = DALLE(spec=tiny_spec(6), vae=settings, dalle=trained.settings)
    load_weights(model, state, tmp_path / "dalle.pth")


def test_normalised_images_are_refused(vae: Path) -> None:
    spec = tiny_spec(6, normalization=([0.485], [0.229]))
    with pytest.raises(ConfigError, match=r"given \[0\.485\].*DALLE takes pixels in 0\.\.1"):
        tiny_dalle(vae, spec=spec)
    tiny_dalle(vae, spec=tiny_spec(6, normalization=([0.0], [1.0])))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reversible": True}, "activation_checkpointing"),
        ({"stable": True}, "stable: given True"),
        ({"sandwich_norm": True}, "sandwich_norm"),
        ({"shared_attn_ids": [0, 0]}, "shared_attn_ids"),
        ({"attn_types": ["conv_like"]}, "conv_like"),
        ({"attn_types": ["sparse"]}, "sparse"),
        ({"attn_types": ["axial_rwo"]}, "Did you mean 'axial_row'?"),
        ({"dim": 18}, "multiples of 4"),
        ({"dim_head": 4}, "at least 6"),
    ],
)
def test_unsupported_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        TransformerSettings(**TINY_TRANSFORMER | options)


def test_reports_longer_than_the_text_are_refused(vae: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer_max_len of the reports is 7"):
        tiny_dalle(vae, spec=tiny_spec(7))


def test_vocabulary_sizes_must_match(vae: Path) -> None:
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


def test_a_vae_that_cannot_be_loaded_is_an_error(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vae\.ckpt: .*nothing\.pth"):
        tiny_dalle(tmp_path / "nothing.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(vae.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        tiny_dalle(cut)
