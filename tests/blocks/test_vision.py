from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torchvision import models
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from tests.small_models import tiny_cnn
from vilmedic.blocks.pretrained import Filled
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.load import check_arguments
from vilmedic.errors import ConfigError


@pytest.fixture(scope="module")
def resnet() -> VisionEncoder:
    return tiny_cnn(backbone="resnet18").eval()


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_pooled_output_equals_that_of_torchvision(resnet: VisionEncoder) -> None:
    whole = models.resnet18()
    whole.load_state_dict(resnet.network.state_dict(), strict=False)
    whole.fc = torch.nn.Identity()
    expected = whole.eval()(images())
    assert resnet.out_features == 512
    torch.testing.assert_close(resnet(images()), expected)
    torch.testing.assert_close(resnet.pooled(images()), expected)


def test_weight_names_equal_those_of_torchvision_without_the_classifier(
    resnet: VisionEncoder,
) -> None:
    theirs = {key for key in models.resnet18().state_dict() if not key.startswith("fc.")}
    assert {key.removeprefix("network.") for key in resnet.state_dict()} == theirs


@pytest.mark.parametrize(
    ("permute", "shape"),
    [
        ("batch_first", (2, 16, 256)),
        ("spatial_first", (16, 2, 256)),
        ("no_permute", (2, 256, 4, 4)),
    ],
)
def test_spatial_output_is_permuted(permute: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    cnn = tiny_cnn(backbone="resnet18", output_layer="layer3", permute=permute).eval()
    output = cnn(images(64))
    assert output.shape == shape
    assert cnn.out_features == 256
    grid = cnn.features(images(64), ["layer3"])["layer3"]
    row, column = 1, 2
    position = 4 * row + column
    seen = {
        "batch_first": lambda: output[0, position],
        "spatial_first": lambda: output[position, 0],
        "no_permute": lambda: output[0, :, row, column],
    }[permute]()
    torch.testing.assert_close(seen, grid[0, :, row, column])
    torch.testing.assert_close(cnn.pooled(images(64)), grid.mean(dim=(2, 3)))
    assert not any(key.startswith("network.layer4") for key in cnn.state_dict())


def test_several_layers_need_one_pass(resnet: VisionEncoder) -> None:
    outputs = resnet.features(images(64), ["layer3", "avgpool"])
    assert {key: value.shape for key, value in outputs.items()} == {
        "layer3": (2, 256, 4, 4),
        "avgpool": (2, 512),
    }
    assert resnet.width("layer3") == 256


@pytest.mark.parametrize(
    ("backbone", "layer", "size", "width"),
    [
        ("densenet121", "avgpool", 32, 1024),
        ("mobilenet_v3_small", "avgpool", 32, 576),
        ("vit_b_32", "avgpool", 224, 768),
        ("swin_t", "features.1", 64, 96),
        ("squeezenet1_1", "avgpool", 64, 512),
        ("regnet_x_400mf", "trunk_output.block3", 64, 160),
        ("googlenet", "avgpool", 64, 1024),
        ("maxvit_t", "stem", 224, 64),
    ],
)
def test_backbones_of_every_family(backbone: str, layer: str, size: int, width: int) -> None:
    cnn = tiny_cnn(backbone=backbone, output_layer=layer)
    output = cnn(images(size))
    assert cnn.out_features == output.shape[-1] == width
    output.sum().backward()
    unused = [name for name, value in cnn.named_parameters() if value.grad is None]
    assert unused == []


def test_densenet_is_pooled_after_its_last_activation() -> None:
    cnn = tiny_cnn(backbone="densenet121").eval()
    grid = cnn.features(images(64), ["features"])["features"]
    torch.testing.assert_close(cnn(images(64)), grid.relu().mean(dim=(2, 3)))


def test_frozen_backbone_does_not_change() -> None:
    cnn = tiny_cnn(freeze=True).train()
    before = {key: value.clone() for key, value in cnn.state_dict().items()}
    output = cnn(images(64, 4))
    assert not output.requires_grad
    assert cnn.training
    assert all(torch.equal(before[key], value) for key, value in cnn.state_dict().items())


def test_measuring_the_width_keeps_batch_statistics() -> None:
    cnn = tiny_cnn()
    assert all(v == 0 for k, v in cnn.state_dict().items() if k.endswith("num_batches_tracked"))
    assert cnn.network.training


def test_dropout_acts_on_the_output_in_training_only() -> None:
    cnn = tiny_cnn(dropout_out=1.0)
    assert cnn(images(64)).count_nonzero() == 0
    assert cnn.eval()(images(64)).count_nonzero() > 0


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'resnet50'"):
        VisionEncoder(backbone="resnet5O", pretrained=False)


def test_unknown_layer_lists_the_layers() -> None:
    with pytest.raises(ConfigError, match=r"conv1, bn1.*avgpool, fc.*Did you mean 'layer4'"):
        tiny_cnn(backbone="resnet18", output_layer="layer5")


def test_layer_after_output_layer_is_refused(resnet: VisionEncoder) -> None:
    with pytest.raises(ConfigError, match="'fc' of ResNet lies behind output_layer"):
        resnet.features(images(), ["fc"])


def test_container_without_output_is_refused() -> None:
    with pytest.raises(ConfigError, match="container"):
        tiny_cnn(backbone="maxvit_t", output_layer="blocks")


def test_unknown_permutation_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'batch_first'"):
        check_arguments(VisionEncoder, {"backbone": "resnet18", "permute": "batchfirst"})


def test_weights_without_network_access_name_the_remedies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    VisionEncoder.fetch(backbone="resnet50", pretrained=False)
    VisionEncoder.fetch(backbone="resnet50", pretrained="weights.pth")
    with pytest.raises(ConfigError, match="there is no folder"):
        VisionEncoder.fetch(backbone="nobody/nothing")
    with pytest.raises(ConfigError, match="no route to host"):
        VisionEncoder.fetch(backbone="resnet50")
    with pytest.raises(ConfigError) as caught:
        VisionEncoder(backbone="resnet50")
    message = str(caught.value)
    assert "no route to host" in message
    assert "Set pretrained=false" in message
    assert str(tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth") in message
    # a checkpoint provides the weights
    assert VisionEncoder(backbone="resnet18", filled=Filled()).out_features == 512


@pytest.mark.parametrize("classifier", [None, 1000, 14])
def test_weights_are_loaded_from_a_file(tmp_path: Path, classifier: int | None) -> None:
    path = tmp_path / "weights.pth"
    network = models.shufflenet_v2_x0_5(num_classes=classifier or 1000)
    state = network.state_dict()
    if classifier is None:
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    torch.save(state, path)
    cnn = tiny_cnn(pretrained=str(path))
    torch.testing.assert_close(cnn.network.conv1[0].weight, network.conv1[0].weight)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(models.resnet18().state_dict(), path)
    with pytest.raises(ConfigError) as caught:
        tiny_cnn(pretrained=str(path))
    assert "tensors are missing, such as 'conv1.0.weight'" in str(caught.value)
    assert "tensors are unknown, such as 'bn1.bias'" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.pth"):
        tiny_cnn(pretrained=str(tmp_path / "nowhere.pth"))


def test_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"run": print}, path)
    with pytest.raises(ConfigError, match="neither a tensor nor a plain"):
        tiny_cnn(pretrained=str(path))


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("layer", "shape"),
    [("avgpool", (2, 16)), ("pooler_output", (2, 16)), ("last_hidden_state", (2, 5, 16))],
)
def test_vision_model_of_transformers(vit_folder: Path, layer: str, shape: tuple[int, ...]) -> None:
    cnn = VisionEncoder(backbone=str(vit_folder), output_layer=layer).eval()
    assert cnn(images()).shape == shape
    assert cnn.out_features == 16
    reference = ViTModel.from_pretrained(vit_folder).eval()(images())
    name = "last_hidden_state" if layer == "last_hidden_state" else "pooler_output"
    torch.testing.assert_close(cnn(images()), reference[name])


def test_convolutional_model_of_transformers(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path)
    assert VisionEncoder(backbone=str(tmp_path))(images()).shape == (2, 16)
    spatial = VisionEncoder(backbone=str(tmp_path), output_layer="last_hidden_state")
    assert spatial(images(64)).shape == (2, 64, 16)


def test_unknown_output_of_transformers(vit_folder: Path) -> None:
    with pytest.raises(ConfigError, match="Allowed: avgpool, last_hidden_state, pooler_output"):
        VisionEncoder(backbone=str(vit_folder), output_layer="layer4")


def test_text_model_is_not_a_backbone(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not take images"):
        VisionEncoder(backbone=str(tmp_path))


def test_the_first_blocks_are_frozen_with_their_statistics() -> None:
    encoder = VisionEncoder(backbone="resnet18", pretrained=False, freeze=3).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(torch.randn(2, 3, 32, 32)).sum().backward()
    trained = {name for name, value in encoder.named_parameters() if value.grad is not None}
    changed = {
        name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])
    }
    frozen = ("network.conv1", "network.bn1", "network.layer1", "network.layer2.0")
    assert not [name for name in trained | changed if name.startswith(frozen)]
    assert {"network.layer2.1.conv1.weight", "network.layer4.1.bn2.weight"} <= trained
    assert "network.layer2.1.bn1.running_mean" in changed
    with pytest.raises(ConfigError, match=r"freeze: given 9, but resnet18 has 8 layers.*1 to 8"):
        VisionEncoder(backbone="resnet18", pretrained=False, freeze=9)
