from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from transformers import BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor

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
    """Noise with edges, which ways of resizing show on."""
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
def test_pixels_are_those_of_the_image_processor(family: str, tmp_path: Path) -> None:
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


def test_pixels_are_those_of_timm(tmp_path: Path) -> None:
    found = VisionEncoder.published_pixels(backbone="timm/vit_small_patch16_224.augreg_in1k")
    assert found is not None
    path = image_file(tmp_path, 320, 400)
    said = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg("vit_small_patch16_224.augreg_in1k").to_dict()
    )
    theirs = timm.data.create_transform(**said)(Image.open(path).convert("RGB"))
    assert grey_levels(ours(path, found), theirs, list(said["std"])) <= 2


def test_no_backbone_of_torchvision_and_no_random_one_says_anything() -> None:
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


def test_images_are_what_the_weights_were_trained_on(
    config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = with_published_pixels(load(config_file), None)
    image = config.data["dataset"]["image"]
    assert (image["resize"], image["crop"], image["interpolation"]) == (52, 48, "bicubic")
    assert image["mean"] == pytest.approx(PROCESSORS["DINOv2"].image_mean)
    assert config.dataset["image"]["std"] == pytest.approx(PROCESSORS["DINOv2"].image_std)
    assert "resize 52, crop 48, interpolation" in caplog.text


def test_what_is_given_stays_with_a_warning(
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


def test_a_run_that_goes_on_keeps_its_images(config_file: Path, tmp_path: Path) -> None:
    first = with_published_pixels(load(config_file), None)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    again = with_published_pixels(load(config_file), {"config": first.data})
    assert again.data["dataset"] == first.data["dataset"]
