from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.config.load import load
from vilmedic.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
# prompt files stand beside the configurations that use them
CONFIGS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.glob("config/**/*.yml")
    if not path.name.startswith("prompts")
)


def test_there_are_configurations() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_configuration_passes_the_check(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load(path)
    assert config.model["proto"]


def test_dalle_takes_what_published_checkpoints_hold() -> None:
    """A VAE of any width, and the lower-case words that their reports were cleaned to."""
    data = load(ROOT / "config/CLIP/dalle.yml").data
    assert set(data["model"]["vae"]) == {"image_size", "ckpt"}
    assert data["dataset"]["seq"]["processing"] == "r2gen_clean_report"


@pytest.mark.parametrize(
    ("name", "loss", "given"),
    [
        ("convirt", "GLoRIALoss", "which compares regions, words, word_mask, visual, linguistic"),
        ("gloria", "ConVIRTLoss", "which compares visual, linguistic; "),
    ],
)
def test_a_loss_that_is_called_with_other_tensors(name: str, loss: str, given: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.loss\.proto .*: given {loss}, {given}"):
        load(ROOT / f"config/SELFSUP/{name}-mimic.yml", [f"model.loss.proto={loss}"])


@pytest.mark.parametrize("loss", ["InfoNCELoss", "SigLIPLoss", "VICRegLoss", "BarlowTwinsLoss"])
@pytest.mark.parametrize("name", ["convirt", "simclr"])
def test_one_line_chooses_another_loss_of_pairs(name: str, loss: str) -> None:
    config = load(ROOT / f"config/phantom/{name}.yml", [f"model.loss.proto={loss}"])
    assert config.data["model"]["loss"]["proto"] == loss


def test_a_loss_that_is_called_alike_may_take_the_place_of_another() -> None:
    config = load(ROOT / "config/SELFSUP/convirt-mimic.yml", ["model.loss.proto=NTXentLoss"])
    assert config.data["model"]["loss"]["proto"] == "NTXentLoss"
