from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    ConvNextImageProcessor,
    ViTImageProcessor,
)

from tests.small_backbones import FAMILIES, saved
from vilmedic.blocks.backbones import PublishedPixels
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.load import load
from vilmedic.datasets.decode import decode_image
from vilmedic.datasets.transforms import Pixels
from vilmedic.training.published_pixels import with_published_pixels

PROCESSORS = {
    "ViT": ViTImageProcessor(size={"height": 48, "width": 48}),
    "Swin": ViTImageProcessor(size={"height": 48, "width": 48}, resample=3),
    "DINOv2": BitImageProcessor(size={"shortest_edge": 52}, crop_size={"height": 48, "width": 48}),
    "ConvNeXt": ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.875),
}


def image_file(folder: Path, height: int, width: int) -> Path:
    """Noise with edges, which shows differences between resizing methods."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (height // 4, width // 4), generator=random)
    grey = noise.repeat_interleave(4, 0).repeat_interleave(4, 1).to(torch.uint8)
    path = folder / "picture.png"
    Image.fromarray(grey.numpy()).save(path)
    return path


def ours(path: Path, found: PublishedPixels) -> torch.Tensor:
    node = {"root": "", **found.keys}
    from vilmedic.datasets.image import ImageDataset

    pixels = Pixels.of_evaluation(ImageDataset, node)
    return pixels.normalized(pixels.plain(decode_image(path, "grey"))[None])[0]


def grey_levels(one: torch.Tensor, other: torch.Tensor, std: list[float]) -> float:
    spread = torch.tensor(std).view(-1, 1, 1)
    return float(((one - other).abs() * spread * 255).max())


@pytest.mark.parametrize("family", PROCESSORS)
def test_pixels_equal_those_of_the_image_processor(family: str, tmp_path: Path) -> None:
    processor = PROCESSORS[family]
    backbone, _ = saved(FAMILIES[family], tmp_path)
    processor.save_pretrained(tmp_path)
    found = VisionEncoder.published_pixels(backbone=backbone)
    assert found is not None
    square = isinstance(processor, ViTImageProcessor)
    path = image_file(tmp_path, 120, 120 if square else 160)
    theirs = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == (3, 48, 48)
    assert grey_levels(ours(path, found), theirs, processor.image_std) <= 2
    assert any("stretches" in note for note in found.notes) == square


def test_pixels_equal_those_of_timm(tmp_path: Path) -> None:
    found = VisionEncoder.published_pixels(backbone="timm/vit_small_patch16_224.augreg_in1k")
    assert found is not None
    path = image_file(tmp_path, 320, 400)
    said = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg("vit_small_patch16_224.augreg_in1k").to_dict()
    )
    theirs = timm.data.create_transform(**said)(Image.open(path).convert("RGB"))
    assert grey_levels(ours(path, found), theirs, list(said["std"])) <= 2


def test_torchvision_and_random_backbones_state_no_pixels() -> None:
    assert VisionEncoder.published_pixels(backbone="resnet18") is None
    assert VisionEncoder.published_pixels(backbone="timm/resnet18", pretrained=False) is None


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    backbone, _ = saved(FAMILIES["DINOv2"], tmp_path / "model")
    PROCESSORS["DINOv2"].save_pretrained(tmp_path / "model")
    content: dict[str, Any] = {
        "name": "run",
        "dataset": {"proto": "ImSeq", "image": {"root": "data"}, "seq": {"root": "data"}},
        "model": {
            "proto": "SimCLR",
            "cnn": {"backbone": backbone},
            "projection": {"visual_embedding_dim": 16, "projection_dim": 8},
            "loss": {"proto": "NTXentLoss", "tau": 0.5},
        },
        "trainor": {"optimizer": "Adam", "batch_size": 4, "epochs": 1},
    }
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(content))
    return path


def test_images_follow_the_pretrained_weights(
    config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = with_published_pixels(load(config_file), None)
    image = config.data["dataset"]["image"]
    assert (image["resize"], image["crop"], image["interpolation"]) == (52, 48, "bicubic")
    assert image["mean"] == pytest.approx(PROCESSORS["DINOv2"].image_mean)
    assert config.dataset["image"]["std"] == pytest.approx(PROCESSORS["DINOv2"].image_std)
    assert "resize 52, crop 48, interpolation" in caplog.text


def test_configured_values_are_kept_with_a_warning(
    config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["dataset.image.mean=[0.5,0.5,0.5]", "dataset.image.crop=40"]
    config = with_published_pixels(load(config_file, words), None)
    image = config.data["dataset"]["image"]
    assert (image["mean"], image["crop"]) == ([0.5, 0.5, 0.5], 40)
    assert "std" not in image
    assert "resize" not in image
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "dataset.image.crop is 40, but its backbone was trained with 48" in "".join(warnings)


def test_a_resumed_run_keeps_its_image_settings(config_file: Path, tmp_path: Path) -> None:
    first = with_published_pixels(load(config_file), None)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    again = with_published_pixels(load(config_file), {"config": first.data})
    assert again.data["dataset"] == first.data["dataset"]


def stated(folder: Path, **fields: Any) -> PublishedPixels | None:
    """The settings read from an image processor with the given fields."""
    backbone, _ = saved(FAMILIES["ViT"], folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return VisionEncoder.published_pixels(backbone=backbone)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "rescale_offset": True,
            "rescale_factor": 1 / 127.5,
            "include_top": True,
            "resample": 2,
            "image_std": [0.5, 0.25, 0.5],
        },
        {"image_processor_type": "ViTImageProcessor", "do_rescale": False, "image_std": [40.0] * 3},
        {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
        {
            "image_processor_type": "MobileViTImageProcessor",  # no normalisation
            "crop_size": {"height": 48, "width": 48},
        },
    ],
    ids=["EfficientNet", "no rescale", "no normalisation", "MobileViT"],
)
def test_values_equal_those_of_the_image_processor(fields: dict[str, Any], tmp_path: Path) -> None:
    found = stated(tmp_path, size={"height": 48, "width": 48}, **fields)
    assert found is not None
    path = image_file(tmp_path, 120, 120)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert grey_levels(ours(path, found), theirs, found.keys["std"]) <= 2


def test_a_padding_processor_gives_a_crop_within_the_image(tmp_path: Path) -> None:
    found = stated(
        tmp_path,
        image_processor_type="BitImageProcessor",
        size={"shortest_edge": 40},
        crop_size={"height": 48, "width": 48},
    )
    assert found is not None
    assert (found.keys["resize"], found.keys["crop"]) == (40, 40)
    assert "it pads images to 48 pixels, which is left out here" in found.notes
    ours(image_file(tmp_path, 120, 160), found)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_processor_type": "ViTImageProcessor", "image_mean": ["a", "b", "c"]},
        {"feature_extractor_type": "WhisperFeatureExtractor"},
    ],
)
def test_an_unreadable_processor_is_logged_in_a_short_line(
    fields: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert stated(tmp_path, **fields) is None
    [line] = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert "cannot be read" in line
    assert len(line) < 400


def test_a_missing_image_processor_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, _ = saved(FAMILIES["ViT"], tmp_path)
    assert VisionEncoder.published_pixels(backbone=backbone) is None
    assert "has no preprocessor_config.json: images stay as the configuration" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "left"),
    [
        ("image_std", [0, 0, 0], ("mean", "std")),
        ("image_std", [0.5, 0.5], ("mean", "std")),
        ("size", {"shortest_edge": 10**9}, ("resize", "crop")),
    ],
)
def test_unusable_values_are_skipped(
    field: str,
    value: Any,
    left: tuple[str, str],
    config_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    config = with_published_pixels(load(config_file), None)
    image = config.data["dataset"]["image"]
    assert not {*left} & image.keys()
    assert "interpolation" in image
    assert f"{' and '.join(left)} stay as the configuration has them" in caplog.text


@pytest.mark.parametrize(
    "said", [{"crop_pct": "all"}, {"input_size": "big"}, {"input_size": [3]}, {"mean": 0.5}]
)
def test_damaged_timm_settings_are_logged(
    said: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, _ = saved(FAMILIES["timm ConvNeXt"], tmp_path)
    file = tmp_path / "config.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, "pretrained_cfg": {**held["pretrained_cfg"], **said}}))
    assert VisionEncoder.published_pixels(backbone=backbone) is None
    assert "cannot be read" in caplog.text
