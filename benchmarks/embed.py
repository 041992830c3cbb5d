"""Images a second of `embed_images` against the loop that a user would write over the same encoder.

    python benchmarks/embed.py
    python benchmarks/embed.py --images 256 --size 1024 --device cuda

The peer decodes with Pillow, resizes and crops with torchvision transforms, and batches with a
DataLoader of as many workers as ours has threads. Both read the same JPEG files and end with the
embeddings in memory; a run that starts workers pays for them, as a user's does. `--cached` times
ours with the picture cache, which the first, uncounted repetition fills. They take turns in one
process; times are medians. The last line printed is one JSON object, in images a second.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import alternate
from vilmedic.blocks.projection import PairedProjection
from vilmedic.blocks.text import TextEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.pixels import Pixels
from vilmedic.datasets.spec import DataSpec
from vilmedic.executors.from_checkpoint import Loaded
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.run import TrainedModel


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=1024, help="short side of the JPEG files")
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


def write_images(folder: Path, count: int, size: int) -> list[str]:
    """Smooth grey JPEG files with some noise, as X-rays have it."""
    random = np.random.default_rng(0)
    height = size * 5 // 4
    shade = np.linspace(0, 160, size)[None] + np.linspace(0, 60, height)[:, None]
    paths = []
    for number in range(count):
        pixels = (shade + random.normal(20, 8, (height, size))).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def make_model(arguments: argparse.Namespace) -> TrainedModel:
    """A ConVIRT of random weights, as `vilmedic.load` gives one."""
    torch.manual_seed(0)
    cnn = VisionEncoder(backbone=arguments.backbone, pretrained=False)
    with torch.inference_mode():
        cnn.eval()
        width = cnn(torch.zeros(1, 3, arguments.crop, arguments.crop)).flatten(1).shape[1]
    settings = {"resize": arguments.resize, "crop": arguments.crop}
    model = make_convirt(cnn, width)
    loaded = Loaded(
        model=model,
        config={},
        spec=DataSpec(),
        pixels=Pixels.of_evaluation(ImageDataset, settings),
        reports=None,
        path=Path("random"),
    )
    return TrainedModel(loaded, device=arguments.device)
