"""Embedding keeps only a few batches of images in memory."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.transforms import Pixels
from vilmedic.inputs import AHEAD, Preprocess
from vilmedic.models.contract import ContrastiveModel
from vilmedic.models.from_checkpoint import Loaded
from vilmedic.trained_model import TrainedModel

BATCH = 16
MANY = 3000


class Means(ContrastiveModel):
    """The mean of each colour channel as an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"visual": batch["images"].mean(dim=(2, 3)) * self.scale}

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


@pytest.fixture
def model() -> TrainedModel:
    pixels = Pixels.of_evaluation(ImageDataset, {"resize": 8, "crop": 8, "mean": [0], "std": [1]})
    loaded = Loaded(Means(), {}, DataSpec(), pixels, None, Path("none.pth"))
    return TrainedModel(loaded, device="cpu")


class Alive:
    """Counts the objects that are alive, and the most at one time."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0

    def add(self, one: Any) -> Any:
        self.now, self.all = self.now + 1, self.all + 1
        self.most = max(self.most, self.now)
        weakref.finalize(one, self._drop)
        return one

    def _drop(self) -> None:
        self.now -= 1


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Alive:
    """The decoded images in memory."""
    alive, read = Alive(), Preprocess.read
    monkeypatch.setattr(Preprocess, "read", lambda *given: alive.add(read(*given)))
    return alive


# The batches that are read ahead, and the current one.
MOST = (AHEAD + 2) * BATCH


def test_embedding_a_generator_keeps_few_batches_in_memory(
    model: TrainedModel, decoded: Alive, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, embedded, stream = Alive(), Alive(), TrainedModel._stream

    def counted(*inputs: Any) -> Iterator[tuple[Tensor, list[str]]]:
        for rows, errors in stream(*inputs):
            yield embedded.add(rows), errors

    monkeypatch.setattr(TrainedModel, "_stream", counted)

    def images() -> Iterator[np.ndarray]:
        for number in range(MANY):
            yield given.add(np.full((9, 9), number % 251, np.uint8))

    rows = model.embed_images(images(), normalize=False, batch_size=BATCH, workers=2)
    expected = torch.arange(MANY)[:, None].expand(-1, 3) % 251 / 255
    torch.testing.assert_close(rows, expected)
    assert embedded.most <= 3  # batches of rows are not kept beside the result
    for alive in (given, decoded):
        assert (alive.all, alive.now) == (MANY, 0)
        assert BATCH <= alive.most <= MOST


@pytest.mark.parametrize("kind", [list, iter])
def test_embedding_many_paths_keeps_few_images_in_memory(
    model: TrainedModel, decoded: Alive, kind: Any, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        Image.new("L", (8, 8), 50 * number).save(path)
    every: Iterable[Path] = kind(paths * (MANY // 4))
    total = 0
    stream = model.stream_images(every, normalize=False, batch_size=BATCH, workers=2)
    for number, (rows, errors) in enumerate(stream):
        assert errors == [""] * len(rows)
        if number % 50 == 0:  # the first image of a batch is the first of the four
            torch.testing.assert_close(rows[:4, 0], torch.tensor([0.0, 50, 100, 150]) / 255)
        total += len(rows)
    del rows
    assert total == MANY
    assert (decoded.all, decoded.now) == (MANY, 0)
    assert BATCH <= decoded.most <= MOST


def test_both_calls_have_the_same_options(model: TrainedModel) -> None:
    both = [inspect.signature(call) for call in (model.embed_images, model.stream_images)]
    assert both[0].parameters == both[1].parameters
    assert both[0].return_annotation == "Tensor"
    with pytest.raises(TypeError, match="feature"):
        model.embed_images([], feature="visual")  # type: ignore[call-arg]
