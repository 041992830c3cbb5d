"""Images per second of `embed_images`, against a loop that a user would write.

    python benchmarks/embed.py
    python benchmarks/embed.py --images 256 --size 1024 --device cuda

The default file size is about that of hospital X-rays, for which decoding takes a visible share of
the time; with --size 1024 the network takes most of it on a CPU.

The peer decodes with Pillow, resizes and crops with torchvision transforms, and batches with a
DataLoader that has as many workers as ours has threads. Both read the same JPEG files with the same
encoder and end with the embeddings in memory; the peer starts its workers each time, as a user's
script does. `cached` is ours with the image cache, which the first, uncounted repetition fills.
Repetitions alternate in one process; times are medians. The last line printed is one JSON object,
in images per second.
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
from vilmedic.blocks.projection import VisualProjection
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.transforms import Pixels
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.from_checkpoint import Loaded
from vilmedic.models.simclr import SimCLR
from vilmedic.trained_model import TrainedModel


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=2048, help="short side of the JPEG files")
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
    """Smooth grey JPEG files with some noise, like X-rays."""
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
    """SimCLR with random weights, as `vilmedic.load` returns it."""
    torch.manual_seed(0)
    cnn = VisionEncoder(backbone=arguments.backbone, pretrained=False)
    projection = VisualProjection(visual_embedding_dim=cnn.out_features, projection_dim=16)
    settings = {"resize": arguments.resize, "crop": arguments.crop}
    loaded = Loaded(
        model=SimCLR(cnn=cnn, projection=projection, loss=NTXentLoss()),
        config={},
        spec=DataSpec(),
        pixels=Pixels.of_evaluation(ImageDataset, settings),
        reports=None,
        path=Path("random"),
    )
    return TrainedModel(loaded, device=arguments.device)


class Files(Dataset):
    """The peer's data set."""

    def __init__(self, paths: list[str], resize: int, crop: int, pixels: Pixels) -> None:
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(resize, antialias=True),
                v2.CenterCrop(crop),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(pixels.mean, pixels.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


def main() -> None:
    """Measure all three and print the comparison."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = make_model(arguments)
    encoder, pixels = model.image_encoder, model.preprocess.pixels
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_images(folder, arguments.images, arguments.size)
        files = Files(paths, arguments.resize, arguments.crop, pixels)

        def ours(cache: Path | None = None) -> torch.Tensor:
            return model.embed_images(
                paths,
                features="visual_backbone",
                normalize=False,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
                cache=cache,
                progress=False,
            )

        def peer() -> torch.Tensor:
            loader = DataLoader(files, arguments.batch_size, num_workers=arguments.workers)
            with torch.inference_mode():
                found = [encoder(batch.to(arguments.device)).flatten(1).cpu() for batch in loader]
            return torch.cat(found)

        likeness = torch.nn.functional.cosine_similarity(ours(), peer()).min()
        print(f"smallest cosine between ours and the peer's embedding of an image: {likeness:.4f}")
        steps = {"ours": ours, "cached": lambda: ours(folder / "cache"), "peer": peer}
        times = alternate(steps, arguments.repetitions)
    speeds = {name: round(arguments.images / took, 2) for name, took in times.items()}
    result = {
        "name": "embed",
        **speeds,
        "unit": "images/s",
        "ratio": round(times["peer"] / times["ours"], 2),
        "cached_ratio": round(times["peer"] / times["cached"], 2),
        "cached_over_ours": round(times["ours"] / times["cached"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
