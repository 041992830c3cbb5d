from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.small_dalles import TINY_TRANSFORMER, TINY_VAE, dalle_batch, save_vae, tiny_dalle
from vilmedic.models.dalle import DALLE

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "axial": {"attn_types": ["full", "axial_row", "axial_col"], "depth": 3},
    "one_type": {"attn_types": ["axial_col"]},
    "shared_embeddings": {"share_input_output_emb": True},
    "learned_positions": {"rotary_emb": False},
    "no_shift": {"shift_tokens": False},
    "no_shift_axial": {"shift_tokens": False, "attn_types": ["axial_row"], "rotary_emb": False},
    "dropouts": {"attn_dropout": 0.3, "ff_dropout": 0.2},
    "weight": {"loss_img_weight": 2},
    "odd_head": {"dim_head": 13, "heads": 3},
    "deep": {"depth": 26, "dim": 8, "heads": 1},
}
VOCABULARY = 15  # of the tiny tokenizer


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae.pth")


def peer(reference: ModuleType, options: dict[str, Any]) -> Any:
    """The reference with the options that both have."""
    settings = TINY_TRANSFORMER | options
    vae = reference.DiscreteVAE(**TINY_VAE)
    return reference.DALLE(vae=vae, num_text_tokens=VOCABULARY, **settings).double()


def pair(reference: ModuleType, vae: Path, options: dict[str, Any]) -> tuple[DALLE, Any]:
    """Our model, and the reference with the same weights."""
    ours, theirs = tiny_dalle(vae, **options).double(), peer(reference, options)
    theirs.load_state_dict(ours.state_dict())
    return ours.train(), theirs.train()


def padded(batch: dict[str, Tensor]) -> Tensor:
    """The reports as the reference expects them: maximum length, padded with 0."""
    length = TINY_TRANSFORMER["text_seq_len"] - batch["input_ids"].shape[1]
    return functional.pad(batch["input_ids"] * batch["attention_mask"], (0, length))


def logits_of(model: DALLE, text: Tensor, image: Tensor) -> Tensor:
    """All logits at once, which the model itself never computes."""
    layer = model.to_logits
    logits: Tensor = layer(model.states(text, image))
    border, words = model.text_seq_len, model.num_text_tokens
    lowest = -torch.finfo(logits.dtype).max
    logits[:, :border, words:] = lowest
    logits[:, border:, :words] = lowest
    return logits


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_loss_and_gradients(reference: ModuleType, vae: Path, name: str) -> None:
    ours, theirs = pair(reference, vae, OPTIONS[name])
    batch = dalle_batch()
    batch["images"] = batch["images"].double()
    codes = ours.image_tokens(batch)

    torch.manual_seed(5)
    loss = ours(batch)["loss"]
    loss.backward()
    torch.manual_seed(5)
    expected = theirs(padded(batch), codes, return_loss=True)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-8)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == {key for key, value in wanted.items() if value is not None}
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-5, atol=1e-8, msg=key)

    ours.eval()
    theirs.eval()
    text = ours.text_tokens(batch["input_ids"], batch["attention_mask"])
    logits = logits_of(ours, text, codes)
    torch.testing.assert_close(logits, theirs(padded(batch), codes), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["default", "axial", "shared_embeddings", "learned_positions"])
def test_checkpoints_load_both_ways(reference: ModuleType, vae: Path, name: str) -> None:
    ours, theirs = tiny_dalle(vae, **OPTIONS[name]), peer(reference, OPTIONS[name]).float()

    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


def test_position_embeddings_match(reference: ModuleType, vae: Path) -> None:
    ours, theirs = tiny_dalle(vae, dim_head=64), peer(reference, {"dim_head": 64}).float()

    assert torch.equal(ours.transformer.pos_emb, theirs.transformer.pos_emb)


def test_dropped_text(reference: ModuleType, vae: Path) -> None:
    ours, theirs = pair(reference, vae, {})
    ours.null_cond_prob = 0.5
    batch = dalle_batch(size=8)
    batch["images"] = batch["images"].double()

    torch.manual_seed(2)
    loss = ours(batch)["loss"]
    torch.manual_seed(2)
    codes = ours.image_tokens(batch)
    expected = theirs(padded(batch), codes, return_loss=True, null_cond_prob=0.5)

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-8)
    assert loss != ours.eval()(batch)["loss"]


def test_raw_images(reference: ModuleType, vae: Path) -> None:
    ours, theirs = pair(reference, vae, {})
    batch = dalle_batch()
    batch["images"] = batch["images"].double()

    expected = theirs(padded(batch), batch["images"], return_loss=True)

    torch.testing.assert_close(ours(batch)["loss"], expected, rtol=1e-5, atol=1e-8)


def test_generated_tokens_follow_the_reference(reference: ModuleType, vae: Path) -> None:
    """Greedy sampling, token by token."""
    ours, theirs = pair(reference, vae, {"attn_types": ["full", "axial_row"]})
    ours.eval()
    theirs.eval()
    batch = dalle_batch()
    text = ours.text_tokens(batch["input_ids"], batch["attention_mask"])
    cache = ours.transformer.make_cache(len(text))
    found = []
    with torch.inference_mode():
        logits = ours.begin_image(text, text[:, :0], cache)
        for place in range(16):
            found.append(logits.argmax(dim=1))
            if place < 15:
                logits = ours.next_image_token(found[-1], torch.tensor([place]), cache)
        expected = text[:, :0]
        for _ in range(16):
            scores = theirs(padded(batch), expected)[:, -1]
            token = scores.argmax(dim=1, keepdim=True) - ours.num_text_tokens
            expected = torch.cat((expected, token), dim=1)

    assert torch.equal(torch.stack(found, dim=1), expected)
