from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from tests.small_backbones import FAMILIES, Family, saved
from tests.small_models import TINY_BERT, tiny_batch, tiny_cnn, tiny_gloria, tiny_spec
from vilmedic.blocks.pretrained import Filled, network_configs
from vilmedic.blocks.projection import VisualEmbedder
from vilmedic.blocks.repeated import checkpoint_blocks, repeated_blocks
from vilmedic.blocks.text import WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.load import check_arguments
from vilmedic.errors import ConfigError

VIT = FAMILIES["ViT"].config
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


def images(size: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def made(family: Family, **settings: Any) -> VisionEncoder:
    torch.manual_seed(0)
    return tiny_cnn(backbone=family.backbone, config=family.config, **settings).eval()


def pooled_by_library(network: nn.Module, pixels: Tensor) -> Tensor:
    found = network(pixels)
    return found if isinstance(found, Tensor) else found.pooler_output.flatten(1)


def states_by_library(network: Any, pixels: Tensor) -> Tensor:
    """The last states as [B, C, h, w], using the library's own token counts."""
    if hasattr(network, "forward_features"):
        states = network.forward_features(pixels)
        if states.ndim == 4:
            return (
                states
                if getattr(network, "output_fmt", "NCHW") == "NCHW"
                else states.permute(0, 3, 1, 2)
            )
        skipped = network.num_prefix_tokens
    else:
        states = network(pixels).last_hidden_state
        if states.ndim == 4:
            return states
        registers = getattr(network.config, "num_register_tokens", 0)
        skipped = 0 if network.config.model_type == "swin" else 1 + registers
    side = int((states.shape[1] - skipped) ** 0.5)
    return states[:, skipped:].transpose(1, 2).unflatten(2, (side, side))


@every
def test_features_of_a_folder_equal_those_of_its_library(family: Family, tmp_path: Path) -> None:
    backbone, network = saved(family, tmp_path)
    cnn = tiny_cnn(backbone=backbone, pretrained=True).eval()
    last = "forward_features" if backbone.startswith("timm/") else "last_hidden_state"
    states = tiny_cnn(backbone=backbone, pretrained=True, output_layer=last).eval()
    assert next(cnn.parameters()).dtype == torch.float32
    with torch.inference_mode():
        close = {"atol": 1e-5, "rtol": 0}
        expected = pooled_by_library(network, images())
        torch.testing.assert_close(cnn(images()), expected, **close)
        assert cnn.out_features == expected.shape[1]
        found = states.regions(states.features(images(), [last])[last], images())
        torch.testing.assert_close(found, states_by_library(network, images()), **close)


@every
def test_regions_of_another_image_size(family: Family) -> None:
    cnn = made(family)
    for size in (32, 64):
        found = cnn.features(images(size), [family.local, "avgpool"])
        regions = cnn.regions(found[family.local], images(size))
        assert regions.shape[2:] == (family.grid * size // 32,) * 2
        assert found["avgpool"].shape == (2, cnn.out_features)
    assert cnn.region_shape(family.local) == (regions.shape[1], *cnn.region_shape(family.local)[1:])


@every
def test_every_trained_parameter_gets_a_gradient(family: Family) -> None:
    cnn = made(family)
    cnn(images()).sum().backward()
    trained = {name: value for name, value in cnn.named_parameters() if value.requires_grad}
    assert [name for name, value in trained.items() if value.grad is None] == []
    left = {name for name, _ in cnn.named_parameters()} - trained.keys()
    assert left <= {"network.embeddings.mask_token"}


@every
def test_layers_are_blocks_in_order(family: Family) -> None:
    cnn = made(family)
    layers = cnn.layers()
    names = [layer.name for layer in layers]
    assert (names[0], names[-1]) == ("embedding", "head")
    assert len(names) == 2 + {"timm ConvNeXt": 5, "ConvNeXt": 3}.get(
        next(key for key, one in FAMILIES.items() if one is family),
        4 if "window_size" in family.config else 2,
    )
    held = [name for layer in layers for name in layer.parameters]
    assert sorted(held) == sorted(name for name, _ in cnn.network.named_parameters())


@every
def test_a_checkpoint_holds_the_network_configuration(family: Family, tmp_path: Path) -> None:
    backbone, _ = saved(family, tmp_path / "folder")
    holder = nn.Module()
    holder.cnn = tiny_cnn(backbone=backbone, pretrained=True).eval()
    networks = network_configs(holder)
    (tmp_path / "folder" / "config.json").unlink()
    again = VisionEncoder(backbone=backbone, filled=Filled(networks)).eval()
    again.load_state_dict(holder.cnn.state_dict())
    torch.testing.assert_close(again(images()), holder.cnn(images()), rtol=0, atol=0)


@every
def test_weights_of_a_state_dict(family: Family, tmp_path: Path) -> None:
    network = made(family).network
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(1)
    cnn = tiny_cnn(
        backbone=family.backbone, config=family.config, pretrained=str(tmp_path / "weights.pth")
    )
    for name, value in cnn.network.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=0, atol=0)


@every
def test_recomputed_blocks_give_the_same_gradient(family: Family) -> None:
    cnn = made(family).train()
    cnn(images()).square().sum().backward()
    plain = {name: value.grad for name, value in cnn.named_parameters() if value.requires_grad}
    cnn.zero_grad()
    assert checkpoint_blocks(repeated_blocks(cnn)) >= 2
    cnn(images()).square().sum().backward()
    for name, value in plain.items():
        found = dict(cnn.named_parameters())[name].grad
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


@every
def test_gloria_attends_to_patches(family: Family) -> None:
    cnn = made(family)
    channels = cnn.region_shape(family.local)[0]
    spec = tiny_spec()
    torch.manual_seed(0)
    model = tiny_gloria(
        spec,
        cnn=cnn,
        encoder=WordEncoder(spec=spec, last_n_layers=1, **TINY_BERT),
        visual_embedder=VisualEmbedder(interm_feature_dim=channels, feature_dim=cnn.out_features),
        local_layer=family.local,
    ).eval()
    batch = tiny_batch()
    features = model.encode(batch)
    assert features["regions"].shape == (4, 16, family.grid, family.grid)
    maps = model.attention(features["regions"], features["words"], features["word_mask"])
    assert maps.shape[2:] == (family.grid, family.grid)
    torch.testing.assert_close(
        maps.sum(dim=(2, 3))[features["word_mask"]],
        torch.ones(int(features["word_mask"].sum())),
    )
    model.contrast(features)["loss"].backward()


def test_timm_blocks_after_the_output_layer_are_removed() -> None:
    cnn = made(FAMILIES["timm ViT"], output_layer="blocks.0", permute="no_permute")
    assert cnn(images()).shape == (2, 21, 16)
    assert not any("blocks.1" in name or name == "norm.weight" for name in cnn.network.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "timm/convnext_ato"}, "Did you mean 'convnext_atto'"),
        ({"backbone": "timm/resnet18.a1_in1"}, "Did you mean 'resnet18.a1_in1k'"),
        ({"backbone": "hf:dinov22"}, "Did you mean 'dinov2'"),
        ({"backbone": "hf:dinov2", "pretrained": True}, "architecture without weights"),
        ({"backbone": "hf:dinov2", "config": {"hidden_sise": 8}}, "Did you mean 'hidden_size'"),
        ({"backbone": "timm/convnext_atto", "config": {"dim": [8]}}, "config.dim: is not an argum"),
        ({"backbone": "resnet18", "config": {"width": 8}}, "network of torchvision"),
        ({"backbone": "timm/convnext_atto", "output_layer": "stage.1"}, "Did you mean 'stages.1'"),
        ({"backbone": "hf:vit", "output_layer": "layers.0"}, "not an output of a transformers"),
    ],
)
def test_wrong_settings_name_the_nearest(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_cnn(**settings)


def test_fields_are_checked_without_torch() -> None:
    with pytest.raises(ConfigError, match=r"hidden_sise.*Did you mean 'hidden_size'"):
        check_arguments(VisionEncoder, {"backbone": "hf:dinov2", "config": {"hidden_sise": 8}})


@pytest.mark.parametrize("backbone", ["timm/convnext_atto", "hf:owner/model"])
@pytest.mark.parametrize("value", [-0.5, 1.0])
def test_invalid_drop_path_rates_are_refused(backbone: str, value: float) -> None:
    given = {"backbone": backbone, "config": {"drop_path_rate": value}}
    with pytest.raises(ConfigError, match=r"config.drop_path_rate: .* number >= 0 and < 1"):
        check_arguments(VisionEncoder, given)


def test_an_unsupported_image_size_is_an_error() -> None:
    cnn = tiny_cnn(backbone="timm/deit3_small_patch16_224", config={"dynamic_img_size": False})
    with pytest.raises(ConfigError, match=r"does not take images of 64 x 64 .* 224 x 224"):
        cnn(images(64))


def test_unavailable_hub_weights_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="could not be downloaded from the hub"):
        VisionEncoder.fetch(backbone="timm/convnext_atto", pretrained=True)


def test_damaged_weights_in_a_folder_are_an_error(tmp_path: Path) -> None:
    backbone, _ = saved(FAMILIES["timm ConvNeXt"], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="is damaged"):
        tiny_cnn(backbone=backbone, pretrained=True)


def folder_of(model_type: str, folder: Path, **settings: Any) -> tuple[str, Any]:
    """Save a tiny transformers vision model; return its backbone name and the model."""
    torch.manual_seed(0)
    network = AutoModel.from_config(AutoConfig.for_model(model_type, **{**VIT, **settings})).eval()
    network.save_pretrained(folder)
    return f"hf:{folder}", network


@pytest.mark.parametrize(
    ("model_type", "size", "grid"),
    [
        (
            "siglip_vision_model",
            30,
            3,
        ),  # 3 whole patches of 8, like SigLIP's 27 patches of 14 in 384
        ("clip_vision_model", 32, 4),  # the class token has another name and no batch
        ("deit", 36, 4),
        ("beit", 32, 4),
        ("ijepa", 36, 4),
    ],
)
def test_patches_of_every_transformer_form_a_grid(
    model_type: str, size: int, grid: int, tmp_path: Path
) -> None:
    backbone, network = folder_of(model_type, tmp_path, image_size=size)
    cnn = VisionEncoder(backbone=backbone, output_layer="last_hidden_state").eval()
    pixels = images(size)
    with torch.inference_mode():
        found = cnn.regions(
            cnn.features(pixels, ["last_hidden_state"])["last_hidden_state"], pixels
        )
        states = network(pixels).last_hidden_state[:, -grid * grid :]
    expected = states.transpose(1, 2).unflatten(2, (grid, grid))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert cnn.region_shape("last_hidden_state") == (16, grid, grid)


def test_timm_transformer_with_size_not_a_multiple_of_its_patch(tmp_path: Path) -> None:
    config = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 30, "patch_size": 8}
    network = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **config).eval()
    save_for_hf(network, str(tmp_path), safe_serialization=True)
    cnn = VisionEncoder(backbone=f"timm/{tmp_path}").eval()
    with torch.inference_mode():
        torch.testing.assert_close(cnn(images(30)), network(images(30)), atol=1e-5, rtol=0)
        states = cnn.features(images(30), ["forward_features"])["forward_features"]
    assert cnn.regions(states, images(30)).shape == (2, 16, 3, 3)
    with pytest.raises(ConfigError, match=r"does not take images of 64 x 64 .* 30 x 30"):
        cnn(images(64))


def test_a_masked_autoencoder_equals_its_vit_without_masking(tmp_path: Path) -> None:
    decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2}
    backbone, network = folder_of("vit_mae", tmp_path, **decoder, decoder_num_hidden_layers=1)
    cnn = VisionEncoder(backbone=backbone).eval()
    network.config.mask_ratio = 0.0
    with torch.inference_mode():
        found = cnn.features(images(), ["last_hidden_state", "avgpool"])
        whole = network(images(), noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
        torch.testing.assert_close(found["last_hidden_state"], whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(found["avgpool"], whole.mean(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["vit", "ijepa"])
def test_a_pooler_missing_from_published_weights_is_not_used(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **VIT)
    network = AutoModel.from_config(config, add_pooling_layer=False).eval()
    network.save_pretrained(tmp_path)
    holder = nn.Module()
    holder.cnn = VisionEncoder(backbone=f"hf:{tmp_path}").eval()
    with torch.inference_mode():
        expected = network(images()).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(holder.cnn(images()), expected, atol=1e-5, rtol=0)
    assert "start at random" not in caplog.text
    again = VisionEncoder(backbone=f"hf:{tmp_path}", filled=Filled(network_configs(holder))).eval()
    again.load_state_dict(holder.cnn.state_dict())
    torch.testing.assert_close(again(images()), holder.cnn(images()), rtol=0, atol=0)
    asked = VisionEncoder(backbone=f"hf:{tmp_path}", output_layer="pooler_output")
    assert asked.network.pooler is not None
    assert "start at random" in caplog.text


def test_timm_features_and_pooled_output_agree() -> None:
    cnn = made(FAMILIES["timm ConvNeXt"])
    states = made(FAMILIES["timm ConvNeXt"], output_layer="forward_features")
    twin = copy.deepcopy(cnn)
    for one in (cnn, twin):
        found = one.features(images(), ["forward_features", "avgpool"])
        torch.testing.assert_close(
            found["forward_features"],
            states.features(images(), ["forward_features"])["forward_features"],
        )
        torch.testing.assert_close(found["avgpool"], one(images()))
    twin = copy.deepcopy(cnn)
    for value in twin.parameters():
        value.data.zero_()
    assert not twin.features(images(), ["forward_features"])["forward_features"].any()
    assert cnn.region_shape("forward_features") == (32, 7, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "hf:vit", "config": {"num_channels": 1}}, "does not encode an image"),
        ({"backbone": "timm/resnet18", "config": {"in_chans": 4}}, "does not encode an image"),
    ],
)
def test_networks_that_do_not_run_on_images_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_cnn(**settings)


def test_models_that_need_more_than_images_are_refused(tmp_path: Path) -> None:
    settings = {key: VIT[key] for key in VIT if key != "image_size"}
    config = AutoConfig.for_model("siglip2_vision_model", **settings, num_patches=16)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"does not encode an image .*'pixel_attention_mask"):
        VisionEncoder(backbone=f"hf:{tmp_path}")


def test_an_image_size_without_position_embeddings_is_an_error() -> None:
    cnn = tiny_cnn(
        backbone="hf:levit",
        config={
            "image_size": 32,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [1, 2, 2],
            "key_dim": [8, 8, 8],
        },
    )
    with pytest.raises(ConfigError, match=r"does not take images of 64 x 64 .* 32 x 32"):
        cnn(images(64))


def test_other_errors_of_a_network_are_raised_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    cnn = made(FAMILIES["ViT"])
    layer = cnn.network.get_submodule("layers.0")

    def full(*_: Any, **__: Any) -> None:
        if not torch.is_grad_enabled():
            return passed(*_, **__)
        raise torch.OutOfMemoryError("no memory left")

    passed = layer.forward
    monkeypatch.setattr(layer, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        cnn(images(64))


@pytest.mark.parametrize(
    ("backbone", "config", "first"),
    [
        ("hf:vit", {**VIT, "num_hidden_layers": 1}, "layers.0"),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 2}, "blocks.0"),
        ("timm/resnet10t", {}, "layer1.0"),
    ],
)
def test_a_network_with_one_block_per_stage_has_blocks(
    backbone: str, config: dict[str, Any], first: str
) -> None:
    cnn = tiny_cnn(backbone=backbone, config=config, freeze=1)
    assert [layer.name for layer in cnn.layers()][:2] == ["embedding", first]
    assert not any(value.requires_grad for value in cnn.network.get_submodule(first).parameters())
    assert cnn.layers()[-1].parameters


def test_weights_without_a_pooler_give_a_network_without_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = AutoModel.from_config(AutoConfig.for_model("vit", **VIT), add_pooling_layer=False)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    cnn = tiny_cnn(backbone="hf:vit", config=VIT, pretrained=str(tmp_path / "weights.pth")).eval()
    with torch.inference_mode():
        expected = network.eval()(images()).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(cnn(images()), expected, atol=1e-5, rtol=0)
