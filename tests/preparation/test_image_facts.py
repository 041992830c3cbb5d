from __future__ import annotations

import numpy as np
import pytest

from vilmedic.phantom.case import draw_case
from vilmedic.phantom.render import render
from vilmedic.preparation.image_facts import brightness_faults, is_torn, negatives, thumbnail


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [render(draw_case(0, "train", number), 160).pixels for number in range(20)]


def test_radiographs_give_no_warning(images: list[np.ndarray]) -> None:
    assert [brightness_faults(image) for image in images] == [[]] * len(images)
    assert not any(map(is_torn, images))
    assert negatives([thumbnail(image) for image in images]) == []


def test_brightness(images: list[np.ndarray]) -> None:
    image = images[0]
    assert brightness_faults(image // 16) == ["near-black"]
    assert brightness_faults(255 - image // 16) == ["near-white"]
    hot = image // 16
    hot[3, 5] = 255
    assert brightness_faults(hot) == ["flattened by single pixels"]
    dead = 255 - image // 16
    dead[3, 5] = 0
    assert brightness_faults(dead) == ["flattened by single pixels"]
    assert brightness_faults(np.full((20, 20), 7, np.uint8)) == []  # reported as blank instead
    marker = image.copy()
    marker[:12, :12] = 255  # the letter L
    assert brightness_faults(marker) == []


def test_negatives_differ_from_the_other_images(images: list[np.ndarray]) -> None:
    mixed = [255 - image if number in (3, 11) else image for number, image in enumerate(images)]
    assert negatives([thumbnail(image) for image in mixed]) == [3, 11]
    assert (
        negatives([thumbnail(255 - image) for image in images]) == []
    )  # if all are negatives, none is unusual
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64), dtype=np.uint8)
    assert negatives([thumbnail(image) for image in noise]) == []
    assert negatives([thumbnail(image) for image in mixed[:5]]) == []  # too few to decide


def test_torn_rows_are_found(images: list[np.ndarray]) -> None:
    found = 0
    for number, image in enumerate(images):
        torn = image.copy()
        torn[70:] = np.roll(torn[70:], 24 + 3 * number, axis=1)
        found += is_torn(torn)
        empty = image.copy()
        empty[100:] = 128
        assert is_torn(empty)
    assert found >= 18
    collimated = images[0].copy()
    collimated[:20] = collimated[-15:] = 0
    assert not is_torn(collimated)
