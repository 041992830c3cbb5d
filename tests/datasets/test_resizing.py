from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from vilmedic.datasets.resizing import crop_square, resize_short_side, resize_to


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


@pytest.mark.parametrize("channels", [1, 3])
def test_scaling_a_part_equals_that_of_torchvision_to_the_bit(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 60, 70), dtype=torch.uint8)
    expected = v2.functional.resized_crop(image, 3, 7, 41, 53, [32, 48], antialias=True)
    assert torch.equal(resize_to(image[:, 3:44, 7:60], 32, 48), expected)
    assert resize_to(image, 60, 70) is image


def test_crop() -> None:
    image = torch.arange(35, dtype=torch.uint8).reshape(1, 5, 7)
    assert torch.equal(crop_square(image, 3, random=False), image[:, 1:4, 2:5])
    torch.manual_seed(0)
    corners = {int(crop_square(image, 3, random=True)[0, 0, 0]) for _ in range(300)}
    assert corners == {row * 7 + column for row in range(3) for column in range(5)}
    with pytest.raises(ValueError, match="5 x 7 pixels is too small for crop=6"):
        crop_square(image, 6, random=False)
