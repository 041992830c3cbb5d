"""Checkpoints in the format of the original vilmedic and of the official GLoRIA repository.

The modules here only give the weights their original names; the expected features are computed
layer by layer.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from transformers import BertConfig, BertGenerationConfig, BertGenerationEncoder, BertModel

from tests.small_models import TINY_BERT, WORDS, tiny_batch, tiny_cnn, tiny_spec, tiny_views
from vilmedic.blocks.projection import PairedProjection, VisualEmbedder, VisualProjection
from vilmedic.blocks.text import TextEncoder, WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.checkpoints.checkpoint import load_checkpoint, load_weights, locate
from vilmedic.errors import CheckpointError
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.gloria import GLoRIA
from vilmedic.models.simclr import SimCLR

VOCABULARY = 4 + len(WORDS)
EXACT = {"rtol": 0, "atol": 1e-6}


def image_part(layers: int = 9) -> nn.Module:
    """The layers of a ResNet in a sequence, named by their numbers."""
    part = nn.Module()
    network = models.resnet18(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that show whether they are loaded
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.9, 1.1)
    part.cnn = nn.Sequential(*list(network.children())[:layers])
    return part


def text_part(*, pooler: bool) -> nn.Module:
    """A BERT with its own pooler and, optionally, a second one."""
    part = nn.Module()
    settings = {**TINY_BERT, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    part.encoder = BertModel(BertConfig(**settings))
    if pooler:
        part.pooler = nn.Module()
        part.pooler.dense = nn.Linear(16, 16)
    return part


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8))


def saved(path: Path, original: nn.Module, prefix: str = "") -> Path:
    weights = {prefix + name: value for name, value in original.state_dict().items()}
    position_ids = f"{prefix}linguistic.encoder.embeddings.position_ids"
    if f"{prefix}linguistic.encoder.embeddings.LayerNorm.bias" in weights:
        weights[position_ids] = torch.arange(64)[None]  # older transformers saved it
    config = OmegaConf.create({"model": {"proto": "x"}, "name": "run"})
    torch.save({"model": weights, "config": config, "__version__": "1.3.2"}, path)
    return path


def convirt(**encoder: Any) -> ConVIRT:
    spec = tiny_spec()
    return ConVIRT(
        spec=spec,
        encoder=TextEncoder(spec=spec, **{**TINY_BERT, "num_hidden_layers": 2, **encoder}),
        cnn=tiny_cnn(backbone="resnet18"),
        projection=PairedProjection(
            visual_embedding_dim=512, textual_embedding_dim=16, projection_dim=8
        ),
        loss=ConVIRTLoss(),
    ).eval()


def filled(model: Any, path: Path) -> Any:
    """Load the weights and convert to float64, because float32 rounds by more than the bound."""
    load_weights(model, load_checkpoint(path), path)
    return model.double()


def exact(original: nn.Module) -> nn.Module:
    return original.eval().double()


def batch_of(make: Callable[..., dict[str, Tensor]], size: int = 4) -> dict[str, Tensor]:
    batch = make(size)
    return batch | {"images": batch["images"].double()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("pooler", [True, False])
@torch.inference_mode()
def test_convirt_features_equal_the_original(tmp_path: Path, pooler: bool, prefix: str) -> None:
    torch.manual_seed(0)
    original = nn.Module()
    original.linguistic, original.visual = text_part(pooler=pooler), image_part()
    original.vis_proj, original.lin_proj = head(512), head(16)
    original.eval()

    model = filled(convirt(), saved(tmp_path / "0.5_3_12.pth", original, prefix))

    exact(original)
    batch = batch_of(tiny_batch)
    found = model.encode(batch)
    encoded = original.linguistic.encoder(batch["input_ids"], batch["attention_mask"])
    first = encoded.last_hidden_state[:, 0]
    pooled = original.linguistic.pooler.dense(first).tanh() if pooler else encoded.pooler_output
    torch.testing.assert_close(found["linguistic"], original.lin_proj(pooled), **EXACT)
    images = original.visual.cnn(batch["images"]).flatten(1)
    torch.testing.assert_close(found["visual"], original.vis_proj(images), **EXACT)


@torch.inference_mode()
def test_convirt_loads_a_randomly_initialised_original_encoder(tmp_path: Path) -> None:
    """Without `proto` the original's encoder has no token types."""
    torch.manual_seed(0)
    original = nn.Module()
    original.linguistic = text_part(pooler=True)
    settings = BertGenerationConfig(
        **{**TINY_BERT, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    )
    original.linguistic.encoder = BertGenerationEncoder(settings)
    original.visual, original.vis_proj, original.lin_proj = image_part(), head(512), head(16)
    original.eval()

    model = filled(convirt(), saved(tmp_path / "a.pth", original))

    exact(original)
    batch = batch_of(tiny_batch)
    first = original.linguistic.encoder(batch["input_ids"], batch["attention_mask"])[0][:, 0]
    expected = original.lin_proj(original.linguistic.pooler.dense(first).tanh())
    torch.testing.assert_close(model.encode(batch)["linguistic"], expected, **EXACT)


def test_a_trained_pooler_of_convirt_is_not_dropped(tmp_path: Path) -> None:
    original = nn.Module()
    original.linguistic, original.visual = text_part(pooler=True), image_part()
    original.vis_proj, original.lin_proj = head(512), head(16)
    path = saved(tmp_path / "a.pth", original)
    with pytest.raises(CheckpointError, match=r"does not have \(2\): encoder\.network\.pooler"):
        filled(convirt(pooling="cls"), path)


@torch.inference_mode()
def test_simclr_features_equal_the_original(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = nn.Module()
    original.visual, original.vis_proj = image_part(), head(512)
    original.visual.model = original.visual.cnn  # the name in later versions
    del original.visual.cnn
    original.eval()
    projection = VisualProjection(visual_embedding_dim=512, projection_dim=8)
    model = SimCLR(
        cnn=tiny_cnn(backbone="resnet18"), projection=projection, loss=NTXentLoss(tau=0.5)
    )

    filled(model.eval(), saved(tmp_path / "a.pth", original))

    exact(original)
    views = batch_of(tiny_views)
    found = model.encode(views)
    for view, name in enumerate(("visual", "visual_second")):
        images = original.visual.model(views["images"][:, view]).flatten(1)
        torch.testing.assert_close(found[name], original.vis_proj(images), **EXACT)


@torch.inference_mode()
def test_a_densenet_encoder_is_loaded_without_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models.densenet121(weights=None).eval()
    original = nn.Module()
    original.visual = nn.Module()
    original.visual.cnn = nn.Sequential(network.features)
    original.vis_proj = head(1024)
    cnn = VisionEncoder(backbone="densenet121", pretrained=False)
    projection = VisualProjection(visual_embedding_dim=1024, projection_dim=8)
    model = SimCLR(cnn=cnn, projection=projection, loss=NTXentLoss(tau=0.5)).eval()

    filled(model, saved(tmp_path / "a.pth", original))

    exact(original)
    images = batch_of(tiny_views, 2)["images"][:, 0]
    features = network.features(images).relu().mean(dim=(2, 3))
    found = model.encode({"images": images})["visual"]
    torch.testing.assert_close(found, original.vis_proj(features), **EXACT)


def gloria() -> GLoRIA:
    spec = tiny_spec()
    settings = {**TINY_BERT, "num_hidden_layers": 2}
    return GLoRIA(
        spec=spec,
        encoder=WordEncoder(spec=spec, last_n_layers=2, **settings),
        cnn=tiny_cnn(backbone="resnet18"),
        visual_embedder=VisualEmbedder(interm_feature_dim=256, feature_dim=512),
        loss=GLoRIALoss(),
        upsample=48,
    ).eval()


def embedders(part: nn.Module) -> None:
    part.global_embedder = nn.Linear(512, 16)
    part.local_embedder = nn.Conv2d(256, 16, 1, bias=False)


def same_as_gloria(model: GLoRIA, layers: Any, embedder: nn.Module, text: BertModel) -> None:
    """Compare regions, words and global features with layers that are run explicitly."""
    batch = batch_of(tiny_batch)
    batch["word_ids"] = batch["word_ids"].clone()
    batch["word_ids"][:, 2:] -= (batch["word_ids"][:, 2:] > 0).long()  # a word of two pieces
    found = model.encode(batch)
    images = functional.interpolate(
        batch["images"], size=(48, 48), mode="bilinear", align_corners=True
    )
    for number, layer in enumerate(layers):
        images = layer(images)
        if number == 6:
            regions = embedder.local_embedder(images)
    torch.testing.assert_close(found["regions"], regions, **EXACT)
    whole = embedder.global_embedder(images.flatten(1))
    torch.testing.assert_close(found["visual"], whole, **EXACT)

    states = text(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    summed = states.hidden_states[-1] + states.hidden_states[-2]
    for report, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        words = [summed[report, 0], summed[report, 1] + summed[report, 2]]
        words += list(summed[report, 3:length])
        torch.testing.assert_close(
            found["words"][report, : len(words)], torch.stack(words), **EXACT
        )
        mean = torch.stack(words).mean(dim=0)
        torch.testing.assert_close(found["linguistic"][report], mean, **EXACT)


@torch.inference_mode()
def test_gloria_features_equal_the_original(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    original = nn.Module()
    original.linguistic, original.visual = text_part(pooler=True), image_part()
    embedders(original)
    original.eval()

    with caplog.at_level(logging.INFO):
        model = filled(gloria(), saved(tmp_path / "a.pth", original))

    assert "the model uses no pooler: encoder.text.network.pooler.dense" in caplog.text
    exact(original)
    same_as_gloria(model, original.visual.cnn, original, original.linguistic.encoder)


def official(path: Path, **text: Any) -> nn.Module:
    """Write a file like the official repository's, with callbacks and configuration."""
    torch.manual_seed(0)
    system = nn.Module()
    system.gloria = nn.Module()
    system.gloria.text_encoder = nn.Module()
    system.gloria.text_encoder.model = text_part(pooler=False).encoder
    system.gloria.img_encoder = nn.Module()
    system.gloria.img_encoder.model = models.resnet18(weights=None)
    system.gloria.img_encoder.model.fc = nn.Identity()
    embedders(system.gloria.img_encoder)
    # Lightning stores the state of a callback under its class.
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__)
    sys.modules |= dict.fromkeys(names, module)
    said = {
        "vision": {"model_name": "resnet_18"},
        "text": {"last_n_layers": 2, "aggregate_method": "sum", "norm": False, **text},
        "gloria": {"temp1": 4.0},
    }
    contents = {
        "state_dict": system.state_dict(),
        "hyper_parameters": OmegaConf.create({"model": said, "phase": "pretrain"}),
        "callbacks": {callback: {"best_model_score": torch.tensor(1.5)}},
        "epoch": 3,
    }
    try:
        torch.save(contents, path)
    finally:
        for name in names:
            del sys.modules[name]
    return system.eval()


@torch.inference_mode()
def test_features_equal_the_official_gloria_repository(tmp_path: Path) -> None:
    path = tmp_path / "chexpert_resnet18.ckpt"
    system = official(path)
    model = filled(gloria(), path)
    exact(system)
    network = system.gloria.img_encoder.model
    layers = list(network.children())[:9]
    same_as_gloria(model, layers, system.gloria.img_encoder, system.gloria.text_encoder.model)
    said = load_checkpoint(path)["config"]["model"]
    assert said == {
        "proto": "GLoRIA",
        "cnn": {"backbone": "resnet18"},
        "encoder": {"last_n_layers": 2},
        "loss": {"temp1": 4.0},
    }


def test_an_official_file_with_other_computation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    official(path, norm=True)
    with pytest.raises(CheckpointError, match="in another way than GLoRIA here: norm is True"):
        load_checkpoint(path)


def test_a_model_zoo_folder_loads_as_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "selfsup" / "simclr-mimic-32"
    folder.mkdir(parents=True)
    original = nn.Module()
    original.visual, original.vis_proj = image_part(), head(512)
    path = folder / "0.31_7_99.pth"
    torch.save({"model": original.state_dict()}, path)
    said = {"model": {"proto": "SimCLR", "loss": {"tau": 0.1}}, "dataset": {"proto": "x"}}
    (folder / "config.yml").write_text(yaml.safe_dump(said))

    assert locate(str(folder), tmp_path / "run") == path
    for given in (folder, path):
        state = load_checkpoint(given)
        assert state["config"] == said
        assert set(state["model"]) == set(original.state_dict())
    torch.save({"model": original.state_dict()}, folder / "0.2_8_99.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(folder)


@pytest.mark.parametrize("make", [convirt, gloria])
def test_own_weight_names_are_unchanged(make: Callable[[], Any]) -> None:
    model = make()
    weights: dict[str, Tensor] = model.state_dict()
    assert list(model.translate(weights)) == list(weights)
