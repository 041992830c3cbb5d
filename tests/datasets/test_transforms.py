from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from vilmedic.datasets.transforms import (
    GaussianBlur,
    Preset,
    build_transforms,
    crop_square,
    flips,
    preset_transforms,
    resize_short_side,
    without_flips,
)


def test_list_is_built_in_order_with_arguments() -> None:
    entries = [
        {"RandomRotation": {"degrees": 5}},
        "RandomInvert",
        {"RandomApply": {"transforms": [{"GaussianBlur": {"kernel_size": 3}}], "p": 0.25}},
    ]
    rotation, invert, apply = build_transforms(entries)
    assert isinstance(rotation, v2.RandomRotation)
    assert rotation.degrees == [-5.0, 5.0]
    assert isinstance(invert, v2.RandomInvert)
    assert isinstance(apply.transforms[0], v2.GaussianBlur)
    assert apply.p == 0.25


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("RandomRotate", "Did you mean 'RandomRotation'"),
        ("functional", "no transform named"),
        ("__doc__", "no transform named"),
        ({"RandomRotation": {"angle": 5}}, "RandomRotation does not take"),
        ({"CenterCrop": {"size": 2}, "Resize": {"size": 2}}, "is written"),
        (3, "is written"),
    ],
)
def test_wrong_entries(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_transforms([entry])


@pytest.mark.parametrize("preset", ["convirt", "simclr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_presets_give_uint8_squares(preset: Preset, channels: int) -> None:
    image = torch.randint(0, 256, (channels, 40, 36), dtype=torch.uint8)
    result = image
    for transform in preset_transforms(preset, 32, channels):
        result = transform(result)
    assert result.shape == (channels, 32, 32)
    assert result.dtype == torch.uint8
    with pytest.raises(ValueError, match="crop is null"):
        preset_transforms(preset, None, channels)


def test_convirt_preset_has_the_values_of_the_paper() -> None:
    crop, flip, affine, jitter, blur = preset_transforms("convirt", 224, 1)
    assert crop.scale == (0.6, 1.0)
    assert flip.p == 0.5
    assert (affine.degrees, affine.translate, affine.scale) == (
        [-20.0, 20.0],
        (0.1, 0.1),
        (0.95, 1.05),
    )
    assert (list(jitter.brightness), list(jitter.contrast)) == ([0.6, 1.4], [0.6, 1.4])
    assert jitter.saturation is None
    assert list(blur.sigma) == [0.1, 3.0]


def test_blur_equals_that_of_torchvision() -> None:
    image = torch.randint(0, 256, (3, 40, 36), dtype=torch.uint8)
    for sigma in (0.1, 1.3, 3.0):
        own = GaussianBlur(9, (sigma, sigma))(image)
        reference = v2.functional.gaussian_blur(image, [9, 9], [sigma])
        assert own.dtype == torch.uint8
        assert (own.int() - reference.int()).abs().max() <= 1
    drawn = torch.tensor([GaussianBlur(3, (0.1, 3.0)).make_params([])["sigma"] for _ in range(500)])
    assert drawn.min() >= 0.1
    assert drawn.max() <= 3.0
    assert abs(drawn.mean() - 1.55) < 0.2


def test_hue_and_greyscale_are_for_colour_only() -> None:
    assert not any(isinstance(t, v2.RandomGrayscale) for t in preset_transforms("simclr", 32, 1))
    assert any(isinstance(t, v2.RandomGrayscale) for t in preset_transforms("simclr", 32, 3))


def test_flips_are_found_and_left_out() -> None:
    nested = v2.RandomApply([v2.RandomHorizontalFlip()], p=0.5)
    assert flips(nested)
    assert not flips(v2.RandomVerticalFlip())
    left = without_flips(preset_transforms("convirt", 32, 1))
    assert len(left) == 4
    assert not any(flips(transform) for transform in left)


def test_resize_sets_the_short_side() -> None:
    image = torch.randint(0, 256, (1, 40, 20), dtype=torch.uint8)
    assert resize_short_side(image, 10).shape == (1, 20, 10)
    assert resize_short_side(image, 20) is image


@pytest.mark.parametrize("shape", [(64, 64), (37, 90), (90, 37), (33, 34), (40, 41), (8, 300)])
@pytest.mark.parametrize("size", [16, 27, 32, 61])
def test_grey_resize_equals_that_of_torchvision_to_the_bit(
    shape: tuple[int, int], size: int
) -> None:
    random = torch.Generator().manual_seed(size)
    image = torch.randint(0, 256, (1, *shape), generator=random, dtype=torch.uint8)
    expected = v2.functional.resize(image, [size], antialias=True)
    result = resize_short_side(image, size)
    assert torch.equal(result, expected)
    assert result.is_contiguous()


def test_crop() -> None:
    image = torch.arange(35, dtype=torch.uint8).reshape(1, 5, 7)
    assert torch.equal(crop_square(image, 3, random=False), image[:, 1:4, 2:5])
    torch.manual_seed(0)
    corners = {int(crop_square(image, 3, random=True)[0, 0, 0]) for _ in range(300)}
    assert corners == {row * 7 + column for row in range(3) for column in range(5)}
    with pytest.raises(ValueError, match="5 x 7 pixels is too small for crop=6"):
        crop_square(image, 6, random=False)
