from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from tests.report.runs import pictures
from vilmedic.drawing import images as module
from vilmedic.drawing.images import EACH, thumbnails


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_few_samples_get_large_thumbnails_in_their_proportions() -> None:
    wide = torch.zeros(3, 200, 400, dtype=torch.uint8)
    [text] = thumbnails(lambda i: wide, [0])
    assert opened(text).size == (144, 72)
    assert opened(text).format == "WEBP"


def test_many_samples_get_smaller_thumbnails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_LEAST", 0)
    drawn = pictures(40)
    texts = thumbnails(lambda i: drawn[i], range(40))
    assert max(opened(texts[0]).size) < 144
    assert sum(len(base64.b64decode(text)) for text in texts) / 40 <= EACH * 1.1


def test_unreadable_images_are_left_empty() -> None:
    def picture(index: int) -> torch.Tensor:
        if index == 1:
            raise OSError("gone")
        return torch.full((1, 8, 8), 200, dtype=torch.uint8)

    texts = thumbnails(picture, [0, 1, 2])
    assert [bool(text) for text in texts] == [True, False, True]
    assert thumbnails(picture, []) == []
