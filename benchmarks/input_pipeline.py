"""Images a second of one core: this data set against the published pipeline, on 512 px JPEGs.

    python benchmarks/input_pipeline.py

The published pipeline opens each file with Pillow, converts it to RGB and applies torchvision's v1
transforms (`Resize`, `RandomCrop`, `ToTensor`, `Normalize`); its samples are stacked to batches.
Ours is the training loader followed by `prepare`, from the JPEGs and from the cache. All end with
normalised float batches on the processor. Times are medians of rounds that alternate in one
process on one thread, after a first one of each, in wall time. The files are grey, as the JPEGs
of MIMIC-CXR are, with the grain that the phantom has at full resolution. The pictures are compared
with a crop from the middle, in grey levels. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.phantom.case import draw_case
from vilmedic.phantom.render import render

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LEVELS = 2  # grey levels by which the pictures may differ


def parse_arguments() -> argparse.Namespace:
    """The command line, with the setting of the published configurations as default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=512, help="pixels a side of the files")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG files")
    parser.add_argument("--mode", choices=["L", "RGB"], default="L", help="of the JPEG files")
    parser.add_argument(
        "--scale", type=int, default=1, help="times the size that pictures are rendered at"
    )
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def write_images(root: Path, arguments: argparse.Namespace) -> list[Path]:
    """Phantom X-rays and a line file; scaled down from a larger size they are less noisy."""
    (root / "images").mkdir()
    paths = [root / "images" / f"{number}.jpg" for number in range(arguments.images)]
    for number, path in enumerate(paths):
        side = arguments.scale * arguments.size
        large = Image.fromarray(render(draw_case(0, "train", number), side).pixels)
        image = large.resize((arguments.size, arguments.size), Image.Resampling.LANCZOS)
        image.convert(arguments.mode).save(path, quality=arguments.quality)
    (root / "train.image.tok").write_text("".join(f"{path.name}\n" for path in paths))
    return paths


def published(resize: int, crop: transforms.Transform) -> Callable[[Path], Tensor]:
    """The published pipeline, from a file to a normalised image."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(resize),
            crop,
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda path: pipeline(Image.open(path).convert("RGB"))


def peer_round(paths: list[Path], arguments: argparse.Namespace) -> int:
    """All images once, in batches, as the published pipeline gives them."""
    load = published(arguments.resize, transforms.RandomCrop(arguments.crop))
    for start in range(0, len(paths), arguments.batch_size):
        torch.stack([load(path) for path in paths[start : start + arguments.batch_size]])
    return len(paths)


def own_round(dataset: ImageDataset, arguments: argparse.Namespace, epoch: int) -> int:
    """All images once, in batches, as training gives them."""
    loader = make_loader(
        dataset,
        batch_size=arguments.batch_size,
        training=True,
        seed=0,
        epoch=epoch,
        num_workers=0,
    )
    return sum(len(dataset.prepare(batch)["images"]) for batch in loader)


def largest_difference(
    paths: list[Path], dataset: ImageDataset, arguments: argparse.Namespace
) -> float:
    """The largest difference of a pixel from the published pipeline, in grey levels."""
    load = published(arguments.resize, transforms.CenterCrop(arguments.crop))
    loader = make_loader(
        dataset, batch_size=arguments.batch_size, training=False, seed=0, num_workers=0
    )
    largest = 0.0
    for batch in loader:
        images = dataset.prepare(batch)["images"]
        other = torch.stack([load(paths[index]) for index in batch["index"].tolist()])
        std = torch.tensor(STD).view(3, 1, 1)
        largest = max(largest, float(((images - other) * std * 255).abs().max()))
    return largest


def main() -> None:
    """Measures all three and prints the comparison."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = write_images(root, arguments)
        mean = statistics.mean(path.stat().st_size for path in paths) / 1024
        print(f"{len(paths)} files ({arguments.mode}) of {mean:.0f} KiB on average", flush=True)

        def dataset(training: bool, **settings: str) -> ImageDataset:
            return ImageDataset(
                split="train",
                training=training,
                seed=0,
                root=str(root),
                resize=arguments.resize,
                crop=arguments.crop,
                **settings,
            )

        cache = {"cache": str(root / "cache")}
        for name, settings in (("files", {}), ("cache", cache)):
            difference = largest_difference(paths, dataset(False, **settings), arguments)
            print(f"{name}: differs from the published pipeline by {difference:.2f} grey levels")
            if difference > LEVELS:
                raise SystemExit(f"That is more than {LEVELS}: the figures would mean nothing.")
        sets = {"ours": dataset(True), "cache": dataset(True, **cache)}
        rates: dict[str, list[float]] = {"peer": [], "ours": [], "cache": []}
        for number in range(arguments.rounds + 1):
            for name, seen in rates.items():
                began = time.perf_counter()
                if name == "peer":
                    count = peer_round(paths, arguments)
                else:
                    count = own_round(sets[name], arguments, number)
                if number:
                    seen.append(count / (time.perf_counter() - began))
    for name, seen in rates.items():
        print(f"{name}: images/s", *(f"{rate:.0f}" for rate in seen))
    peer, ours, cached = (statistics.median(rates[name]) for name in ("peer", "ours", "cache"))
    result = {
        "name": "input_pipeline",
        "ours": round(ours, 1),
        "peer": round(peer, 1),
        "unit": "images/s",
        "ratio": round(ours / peer, 2),
        "cache": round(cached, 1),
        "ratio_cache": round(cached / peer, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
