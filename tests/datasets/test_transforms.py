from __future__ import annotations

import pytest
from torchvision.transforms import v2

from vilmedic.datasets.transforms import build_transforms, flips


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
def test_wrong_entries_are_refused(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_transforms([entry])


def test_flips_are_found() -> None:
    nested = v2.RandomApply([v2.RandomHorizontalFlip()], p=0.5)
    assert flips(nested)
    assert not flips(v2.RandomVerticalFlip())
