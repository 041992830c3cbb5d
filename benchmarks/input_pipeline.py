"""Images per second on one core: our data set against the published pipeline, on 512 px JPEGs.

    python benchmarks/input_pipeline.py

The published pipeline opens each file with Pillow, converts it to RGB, applies torchvision's v1
transforms (`Resize`, `RandomCrop`, `ToTensor`, `Normalize`) and stacks the samples to batches. Ours
is the training loader followed by `prepare`, from the JPEGs and from the cache. All end with
normalised float batches on the CPU. Each augmentation preset is measured against torchvision's v2
transforms on the same decoded images, one by one, with a separable blur. Rates are medians of
alternating rounds in one process on one thread, after one warm-up of each, in CPU time. The files
are grey like the JPEGs of MIMIC-CXR, with the noise of the phantom at full resolution. The images
are compared in grey levels: the largest difference with a centre crop, the mean difference with a
preset and the same random numbers. Decoding alone is the upper bound of all rates. The last line
printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vilmedic.datasets.aligned import seeded, stable_seed
from vilmedic.datasets.decode import decode_image
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.image_source import resize_short_side
from vilmedic.datasets.loader import make_loader
from vilmedic.phantom.case import draw_case
from vilmedic.phantom.render import render

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LEVELS = 2  # grey levels by which the images may differ
PRESETS = ("convirt", "simclr", "simclr_xray")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, with the setting of the published configurations as default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=512, help="side of the files in pixels")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality")
    parser.add_argument(
        "--mode", choices=["L", "RGB"], default="L", help="colour mode of the JPEG files"
    )
    parser.add_argument("--scale", type=int, default=1, help="render images this many times larger")
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def write_images(root: Path, arguments: argparse.Namespace) -> list[Path]:
    """Write phantom X-rays and a line file; images scaled down from larger ones are less noisy."""
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
    """All images once, in batches, through the published pipeline."""
    load = published(arguments.resize, transforms.RandomCrop(arguments.crop))
    for start in range(0, len(paths), arguments.batch_size):
        torch.stack([load(path) for path in paths[start : start + arguments.batch_size]])
    return len(paths)


def own_round(dataset: ImageDataset, arguments: argparse.Namespace, epoch: int) -> int:
    """All images once, in batches, through the training loader."""
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
    """Largest difference of a pixel from the published pipeline, in grey levels."""
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


class AxisBlur(v2.Transform):
    """torchvision's Gaussian blur, along one axis and then the other."""

    def __init__(self, width: int, low: float, high: float) -> None:
        super().__init__()
        self.width, self.low, self.high = width, low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the standard deviation."""
        return {"sigma": [self.low + (self.high - self.low) * float(torch.rand(()))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Blur one uint8 image [C, H, W]."""
        rows = v2.functional.gaussian_blur(inpt.float(), [1, self.width], **params)
        both = v2.functional.gaussian_blur(rows, [self.width, 1], **params)
        return both.round_().to(torch.uint8)


def of_torchvision(preset: str, crop: int) -> v2.Compose:
    """A preset for grey images as torchvision's transforms."""
    flip, width = v2.RandomHorizontalFlip(), crop // 10 | 1
    if preset == "simclr_xray":
        return v2.Compose([flip, v2.RandomCrop(crop)])
    if preset == "simclr":
        jitter, blur = v2.ColorJitter(0.8, 0.8), AxisBlur(width, 0.1, 2.0)
        part = v2.RandomResizedCrop(crop, scale=(0.08, 1.0))
        return v2.Compose([part, flip, v2.RandomApply([jitter], 0.8), v2.RandomApply([blur], 0.5)])
    bilinear = InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomResizedCrop(crop, scale=(0.6, 1.0)),
            flip,
            v2.RandomAffine(20, (0.1, 0.1), (0.95, 1.05), interpolation=bilinear),
            v2.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4)),
            AxisBlur(width, 0.1, 3.0),
        ]
    )


def torchvision_image(path: Path, resize: int, preset: v2.Compose) -> Tensor:
    """An image [1, H, W] after torchvision's transforms."""
    image: Tensor = preset(resize_short_side(decode_image(path), resize))
    return image


def torchvision_round(paths: list[Path], arguments: argparse.Namespace, preset: v2.Compose) -> int:
    """All images once, in normalised batches, one by one through torchvision's transforms."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for start in range(0, len(paths), arguments.batch_size):
        some = paths[start : start + arguments.batch_size]
        pixels = torch.stack([torchvision_image(path, arguments.resize, preset) for path in some])
        (pixels * (1 / (255 * std))).sub_(mean / std)
    return len(paths)


def average_difference(
    paths: list[Path], dataset: ImageDataset, arguments: argparse.Namespace, preset: str
) -> float:
    """Mean difference of a pixel from torchvision's transforms, in grey levels."""
    transform = of_torchvision(preset, arguments.crop)
    differences = []
    for line, path in enumerate(paths):
        with seeded(stable_seed("image", 0, 0, line, 0)):
            expected = torchvision_image(path, arguments.resize, transform)
        [image] = dataset.images(line)
        differences.append((image.float() - expected).abs().mean().item())
    return statistics.mean(differences)


def decoding_round(paths: list[Path]) -> int:
    """Decode all images once, nothing else."""
    for path in paths:
        simplejpeg.decode_jpeg(path.read_bytes(), "GRAY")
    return len(paths)


def main() -> None:
    """Measure all of them and print the comparison."""
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
            check(name, largest_difference(paths, dataset(False, **settings), arguments))
        sets = {"ours": dataset(True), "cache": dataset(True, **cache)}
        rounds: dict[str, Callable[[int], int]] = {
            "decoding": lambda number: decoding_round(paths),
            "peer": lambda number: peer_round(paths, arguments),
        }
        for preset in PRESETS:
            sets[preset] = dataset(True, preset=preset)
            sets[f"{preset}_cache"] = dataset(True, preset=preset, **cache)
            check(preset, average_difference(paths, sets[preset], arguments, preset))
            rounds[f"{preset} of torchvision"] = partial(
                lambda transform, number: torchvision_round(paths, arguments, transform),
                of_torchvision(preset, arguments.crop),
            )
        for name, data in sets.items():
            rounds[name] = partial(own_round, data, arguments)
        rates: dict[str, list[float]] = {name: [] for name in rounds}
        for number in range(arguments.rounds + 1):
            for name, run in rounds.items():
                began = time.process_time()
                count = run(number)
                if number:
                    rates[name].append(count / (time.process_time() - began))
    for name, seen in rates.items():
        print(f"{name}: images/s", *(f"{rate:.0f}" for rate in seen))
    medians = {name: round(statistics.median(seen), 1) for name, seen in rates.items()}
    result = {
        "name": "input_pipeline",
        "ours": medians["ours"],
        "peer": medians["peer"],
        "unit": "images/s",
        "ratio": round(medians["ours"] / medians["peer"], 2),
        "cache": medians["cache"],
        "ratio_cache": round(medians["cache"] / medians["peer"], 2),
        "decoding": medians["decoding"],
    }
    for preset in PRESETS:
        other = medians[f"{preset} of torchvision"]
        result |= {name: medians[name] for name in (preset, f"{preset}_cache")}
        result[f"{preset}_of_torchvision"] = other
        result[f"ratio_{preset}"] = round(medians[preset] / other, 2)
    print(json.dumps(result))


def check(name: str, difference: float) -> None:
    """Print the difference of the images in grey levels; exit if it is too large."""
    print(f"{name}: differs from torchvision by {difference:.2f} grey levels", flush=True)
    if difference > LEVELS:
        raise SystemExit(f"That is more than {LEVELS}: the rates would not be comparable.")


if __name__ == "__main__":
    main()
