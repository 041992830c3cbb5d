from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import InterpolationMode, v2

from vilmedic.datasets.aligned import seeded
from vilmedic.datasets.augment import Affine, Augmentation, preset_augmentation
from vilmedic.datasets.transforms import Preset

SIDE = 64
_BILINEAR = InterpolationMode.BILINEAR


def published(preset: Preset, channels: int) -> list[v2.Transform]:
    """The presets as a sequence of torchvision's transforms."""
    flip = v2.RandomHorizontalFlip(p=0.5)
    blur = SIDE // 10 | 1
    if preset == "simclr_xray":
        return [flip, v2.RandomCrop(SIDE)]
    if preset == "convirt":
        return [
            v2.RandomResizedCrop(SIDE, scale=(0.6, 1.0)),
            flip,
            v2.RandomAffine(20, (0.1, 0.1), (0.95, 1.05), interpolation=_BILINEAR),
            v2.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4)),
            v2.GaussianBlur(blur, sigma=(0.1, 3.0)),
        ]
    jitter = v2.ColorJitter(0.8, 0.8) if channels == 1 else v2.ColorJitter(0.8, 0.8, 0.8, 0.2)
    return [
        v2.RandomResizedCrop(SIDE, scale=(0.08, 1.0)),
        flip,
        v2.RandomApply([jitter], p=0.8),
        *([v2.RandomGrayscale(p=0.2)] if channels == 3 else []),
        v2.RandomApply([v2.GaussianBlur(blur, sigma=(0.1, 2.0))], p=0.5),
    ]


def drawn_image(number: int, channels: int, height: int = 96, width: int = 80) -> torch.Tensor:
    """An image with large shapes, edges and noise."""
    random = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, channels, 5, 4, generator=random)
    shapes = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    grain = 0.05 * torch.randn(channels, height, width, generator=random)
    return ((shapes + grain).clamp(0, 1) * 255).to(torch.uint8)


def whole(augmentation: Augmentation, image: torch.Tensor, seed: int) -> torch.Tensor:
    """An image after the whole augmentation."""
    with seeded(seed):
        cut, row = augmentation.cut(image)
    return augmentation.apply(cut[None], torch.tensor([row]))[0]


def batch(augmentation: Augmentation, channels: int, size: int) -> tuple[torch.Tensor, ...]:
    images, rows = [], []
    for number in range(size):
        with seeded(number):
            image, row = augmentation.cut(drawn_image(number, channels))
        images.append(image)
        rows.append(row)
    return torch.stack(images), torch.tensor(rows)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("preset", "most", "mean"),
    [("simclr_xray", 0, 0), ("simclr", 6, 0.6), ("convirt", 255, 1.5)],
)
def test_presets_equal_those_of_torchvision(
    preset: Preset, channels: int, most: int, mean: float
) -> None:
    augmentation = preset_augmentation(preset, SIDE, channels)
    transforms = v2.Compose(published(preset, channels))
    for number in range(40):
        image = drawn_image(number, channels, *[(96, 80), (70, 130), (300, 66)][number % 3])
        own = whole(augmentation, image, number)
        with seeded(number):
            expected = transforms(image)
        change = (own - expected).abs()
        assert own.dtype == torch.float32
        assert torch.equal(own, own.round().clamp(0, 255))
        assert change.max() <= most
        assert change.mean() <= mean


def test_affine_maps_differ_from_torchvision_only_at_the_black_border() -> None:
    """torchvision fades border pixels to black twice."""
    ranges = Affine(degrees=20, shift=0.1, scale=(0.95, 1.05))
    augmentation = Augmentation(crop=None, channels=1, affine=ranges)
    transform = v2.RandomAffine(20, (0.1, 0.1), (0.95, 1.05), interpolation=_BILINEAR)
    black = 0
    for number in range(20):
        image = drawn_image(number, 1)
        own = whole(augmentation, image, number)
        with seeded(number):
            expected = transform(image)
        with seeded(number):
            inside = transform(torch.full_like(image, 255)) == 255
        assert (own - expected)[inside].abs().max() <= 1
        black += int((own[expected == 0] == 0).sum())
    assert black > 1000


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 3.0])
@pytest.mark.parametrize("side", [20, 64, 100, 224])
def test_blur_equals_torchvision_up_to_one_level(sigma: float, side: int) -> None:
    augmentation = Augmentation(crop=side, channels=3, blur=(sigma, sigma))
    image = drawn_image(1, 3, side, side)
    own = whole(augmentation, image, 0)
    expected = v2.functional.gaussian_blur(image, [side // 10 | 1] * 2, [sigma])
    assert (own - expected).abs().max() <= 1


@pytest.mark.parametrize(("preset", "channels"), [("convirt", 1), ("convirt", 3), ("simclr", 3)])
def test_an_image_is_bit_identical_in_every_batch(preset: Preset, channels: int) -> None:
    augmentation = preset_augmentation(preset, 50, channels)
    images, rows = batch(augmentation, channels, 9)
    alone = torch.cat([augmentation.apply(images[n : n + 1], rows[n : n + 1]) for n in range(9)])
    assert torch.equal(augmentation.apply(images, rows), alone)
    order = torch.tensor([7, 2, 5])
    assert torch.equal(augmentation.apply(images[order], rows[order]), alone[order])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmentation.apply(images, rows), alone)


def test_blur_sums_are_exact() -> None:
    augmentation = Augmentation(crop=224, channels=1, blur=(3.0, 3.0))
    white = torch.full((1, 224, 224), 255, dtype=torch.uint8)
    assert torch.equal(whole(augmentation, white, 0), white.float())
    with seeded(0):
        _, row = augmentation.cut(white)
    assert sum(row) + sum(row[1:]) == 2048
    assert all(weight == int(weight) for weight in row)


@pytest.mark.parametrize(("preset", "channels"), [("convirt", 1), ("simclr", 3)])
def test_augmentation_reads_nothing_from_the_device(preset: Preset, channels: int) -> None:
    augmentation = preset_augmentation(preset, SIDE, channels)
    images, rows = batch(augmentation, channels, 4)
    with _fake_device() as fake:
        result = augmentation.apply(fake(images), fake(rows))
        assert result.shape == images.shape
        assert result.device.type == "cuda"


@contextmanager
def _fake_device() -> Iterator[Any]:
    """Copies tensors to a device without values: reading one is an error."""
    with FakeTensorMode() as mode:
        yield lambda value: mode.from_tensor(value).to("cuda")


def test_convirt_preset_has_the_values_of_the_paper() -> None:
    preset = preset_augmentation("convirt", 224, 1)
    assert preset.area == (0.6, 1.0)
    assert preset.flip
    assert preset.affine == Affine(degrees=20, shift=0.1, scale=(0.95, 1.05))
    assert preset.jitter == ((0.6, 1.4), (0.6, 1.4))
    assert (preset.jitter_share, preset.grey_share, preset.blur_share) == (1, 0, 1)
    assert preset.blur == (0.1, 3.0)


def test_hue_and_greyscale_apply_only_to_colour() -> None:
    grey, colour = (preset_augmentation("simclr", 32, channels) for channels in (1, 3))
    assert (len(grey.jitter), grey.grey_share) == (2, 0)
    assert (len(colour.jitter), colour.grey_share) == (4, 0.2)


@pytest.mark.parametrize("preset", ["convirt", "simclr"])
def test_presets_that_scale_need_a_crop(preset: Preset) -> None:
    with pytest.raises(ValueError, match="crop is null"):
        preset_augmentation(preset, None, 1)
