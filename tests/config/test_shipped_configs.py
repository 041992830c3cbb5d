from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.config.load import load
from vilmedic.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
# prompt files are beside the configurations that use them
CONFIGS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.glob("config/**/*.yml")
    if not path.name.startswith("prompts")
)


def test_shipped_configurations_are_found() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_configuration_passes_the_check(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load(path)
    assert config.model["proto"]


def test_dalle_accepts_the_settings_of_published_checkpoints() -> None:
    """A VAE of any width, and the lower-case words of their cleaned reports."""
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
def test_a_loss_with_other_inputs_is_refused(name: str, loss: str, given: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.loss\.proto .*: given {loss}, {given}"):
        load(ROOT / f"config/SELFSUP/{name}-mimic.yml", [f"model.loss.proto={loss}"])


@pytest.mark.parametrize("loss", ["InfoNCELoss", "SigLIPLoss", "VICRegLoss", "BarlowTwinsLoss"])
@pytest.mark.parametrize("name", ["convirt", "simclr"])
def test_one_override_selects_another_pair_loss(name: str, loss: str) -> None:
    config = load(ROOT / f"config/phantom/{name}.yml", [f"model.loss.proto={loss}"])
    assert config.data["model"]["loss"]["proto"] == loss


def test_a_plugin_loss_with_the_same_inputs_is_accepted() -> None:
    config = load(ROOT / "config/SELFSUP/convirt-mimic.yml", ["model.loss.proto=NTXentLoss"])
    assert config.data["model"]["loss"]["proto"] == "NTXentLoss"
