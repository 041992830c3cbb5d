from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_dalles import TINY_TRANSFORMER, save_vae, tiny_dalle
from vilmedic.checkpoints.checkpoint import save_checkpoint
from vilmedic.config.sections import GenerationSection
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.generation.generators import load_generators
from vilmedic.models.dalle import DALLE


@pytest.fixture
def model(tmp_path: Path) -> DALLE:
    return tiny_dalle(save_vae(tmp_path / "vae.pth"))


def saved(path: Path, model: DALLE, move: float = 0.0, **dalle: Any) -> Path:
    """A checkpoint with shifted transformer weights; its average is shifted by twice as much."""
    weights = model.state_dict()

    def moved(by: float) -> dict[str, torch.Tensor]:
        return weights | {"text_emb.weight": weights["text_emb.weight"] + by}

    config = {"model": {"dalle": TINY_TRANSFORMER | dalle}}
    save_checkpoint({"model": moved(move), "ema": moved(2 * move), "config": config}, path)
    return path


def test_ema_weights_generate_images_if_configured(model: DALLE, tmp_path: Path) -> None:
    before = model.text_emb.weight.detach().clone()
    path = saved(tmp_path / "a.pth", model, move=1.0)
    [plain] = load_generators(model, [path], GenerationSection())
    torch.testing.assert_close(plain.text_emb.weight, before + 1)
    [averaged] = load_generators(model, [path], GenerationSection(), ema=True)
    torch.testing.assert_close(averaged.text_emb.weight, before + 2)


def test_several_models_share_their_vae(model: DALLE, tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{n}.pth", model, move=float(n)) for n in (1, 2)]
    one, two = load_generators(model, paths, GenerationSection())
    assert one.vae is two.vae
    assert not torch.equal(one.text_emb.weight, two.text_emb.weight)


@pytest.mark.parametrize(
    ("dropped", "cond_scale", "warned"), [(0.0, 3.0, True), (0.1, 3.0, False), (0.0, 1.0, False)]
)
def test_guidance_without_text_dropout_training_warns(
    model: DALLE,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    dropped: float,
    cond_scale: float,
    warned: bool,
) -> None:
    path = saved(tmp_path / "a.pth", model, null_cond_prob=dropped)
    load_generators(model, [path], GenerationSection(cond_scale=cond_scale))
    assert ("ensemblor.cond_scale is 3, but a.pth was trained with" in caplog.text) == warned


def test_mismatched_transformers_and_models_are_refused(model: DALLE, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", model, attn_types=["axial_col"])
    with pytest.raises(CheckpointError, match=r"a\.pth: .*attn_types is"):
        load_generators(model, [path], GenerationSection())
    with pytest.raises(ConfigError, match="Linear makes no images"):
        load_generators(torch.nn.Linear(1, 1), [path], GenerationSection())
