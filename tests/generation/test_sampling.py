from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small_dalles import dalle_batch, save_vae, tiny_dalle
from vilmedic.generation.sampling import Sampling, draw, generate_tokens
from vilmedic.models.dalle import DALLE


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae.pth")


def strong(vae: Path, seed: int = 0, **options: Any) -> DALLE:
    """A model whose logits depend on everything that it has seen."""
    model = tiny_dalle(vae, **options).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("vae."):
            parameter.data = torch.randn_like(parameter) * 0.5
    return model


def numbers(size: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(size, 16, generator=random, dtype=torch.float64)


def shares(logits: Tensor, sampling: Sampling, vocabulary: int) -> Tensor:
    """How often each token is drawn for evenly spread random numbers."""
    even = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    drawn = draw(logits.expand(len(even), -1), even, sampling, vocabulary)
    return drawn.bincount(minlength=logits.shape[1]) / len(even)


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    found = shares(logits, Sampling(temperature=0.7, filter_thres=0.0), 4)
    torch.testing.assert_close(found, (logits[0] / 0.7).softmax(0), atol=1e-3, rtol=0)


def test_the_share_that_is_dropped_counts_the_words() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    found = shares(logits, Sampling(filter_thres=0.75), 8)
    assert found.nonzero().flatten().tolist() == [0, 2]
    assert shares(logits, Sampling(filter_thres=0.99), 10).tolist() == [1, 0, 0, 0]


def test_the_nucleus_is_the_smallest_set_that_is_likely_enough() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.8, 2), (0.9, 3), (1.0, 4)):
        found = shares(logits, Sampling(filter_thres=0.0, top_p=top_p), 4)
        assert (found > 0).sum() == kept, top_p


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(filter_thres=0.5),
        Sampling(filter_thres=0.0, temperature=0.8, top_p=0.9),
        Sampling(filter_thres=0.2, cond_scale=3.0),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"attn_types": ["axial_row", "axial_col"]}, {"rotary_emb": False, "shift_tokens": False}],
)
def test_the_cache_changes_no_token(vae: Path, options: dict[str, Any], sampling: Sampling) -> None:
    models = [strong(vae, seed, **options) for seed in (0, 1)]
    batch = dalle_batch()
    for start in (None, torch.tensor([[3, 1, 4, 1, 5]]).expand(3, -1)):
        given = (models, batch["input_ids"], batch["attention_mask"], numbers(3), sampling)
        cached = generate_tokens(*given, start=start)
        assert torch.equal(cached, generate_tokens(*given, start=start, cached=False))
        if start is not None:
            assert torch.equal(cached[:, :5], start)
    assert len(cached.unique()) > 3


def test_an_image_depends_on_its_own_numbers_and_report(vae: Path) -> None:
    model, batch, sampling = strong(vae), dalle_batch(), Sampling()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    together = generate_tokens([model], ids, mask, numbers(3), sampling)
    alone = generate_tokens([model], ids[1:2], mask[1:2], numbers(3)[1:2], sampling)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together, generate_tokens([model], ids, mask, numbers(3, 1), sampling))


def test_guidance_goes_beyond_the_text(vae: Path) -> None:
    """The first token's logits are those without text plus a multiple of the difference."""
    model, batch = strong(vae), dalle_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.inference_mode():
        texts = (model.text_tokens(ids, m) for m in (mask, torch.zeros_like(mask)))
        nothing = ids[:, :0]
        with_text, without = (
            model.image_logits(model.transformer(model.embed(text, nothing))[:, -1])
            for text in texts
        )
    expected = (without + 5 * (with_text - without)).argmax(dim=1)
    greedy = Sampling(filter_thres=0.999, cond_scale=5.0)
    assert torch.equal(generate_tokens([model], ids, mask, numbers(3), greedy)[:, 0], expected)


def test_progress_counts_tokens(vae: Path) -> None:
    told: list[int] = []
    batch = dalle_batch()
    start = torch.zeros(3, 4, dtype=torch.int64)
    generate_tokens(
        [strong(vae)],
        batch["input_ids"],
        batch["attention_mask"],
        numbers(3),
        Sampling(),
        start=start,
        progress=told.append,
    )
    assert told == [3] * 12
