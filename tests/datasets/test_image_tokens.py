from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dalles import TINY_VAE
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.image_tokens import cache_tokens
from vilmedic.datasets.loader import make_loader
from vilmedic.errors import ConfigError
from vilmedic.models.vae import VAE

CPU = torch.device("cpu")


class Model:
    """What a model shows to the cache."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.vae = VAE(**TINY_VAE).eval()


def images(runtime: Callable[..., dict[str, Any]], **options: Any) -> ImageDataset:
    settings = {"resize": 16, "crop": 16, "preset": "center_crop", "mean": [0], "std": [1]}
    given = runtime("training", "seed", "run_dir") | settings | {"tokens": "cache"} | options
    return ImageDataset(**given)


def batches(data: ImageDataset) -> list[torch.Tensor]:
    loader = make_loader(data, batch_size=3, training=False, seed=0, num_workers=0)
    return [batch["image_tokens"] for batch in loader]


def test_tokens_are_those_of_the_images(runtime: Callable[..., dict[str, Any]]) -> None:
    model, plain = Model(), images(runtime, tokens=None)
    data = images(runtime)
    cache_tokens(data, model, CPU, 0)

    loader = make_loader(plain, batch_size=3, training=False, seed=0, num_workers=0)
    for found, batch in zip(batches(data), loader, strict=True):
        expected = model.vae.get_codebook_indices(plain.finish(batch)["images"])
        assert torch.equal(found, expected)
    assert data.images(0)[0].shape == (1, 16, 16)


def test_tokens_are_computed_once_for_a_vae(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = Model()
    first = images(runtime)
    cache_tokens(first, model, CPU, 0)
    [path] = (tmp_path / "run" / "tokens").iterdir()
    stamp = path.stat().st_mtime_ns

    again = images(runtime)
    cache_tokens(again, model, CPU, 0)
    assert path.stat().st_mtime_ns == stamp
    cache_tokens(images(runtime), Model(seed=1), CPU, 0)
    cache_tokens(images(runtime, mean=[0.1]), model, CPU, 0)
    assert len(list(path.parent.iterdir())) == 3
    model.vae = VAE(**TINY_VAE, normalization=[[0.2] * 3, [0.1] * 3]).eval()
    model.vae.load_state_dict(Model().vae.state_dict())
    cache_tokens(images(runtime), model, CPU, 0)
    assert len(list(path.parent.iterdir())) == 4


def test_an_undecodable_image_stays_one(
    runtime: Callable[..., dict[str, Any]], root: Path, write: Callable[[str, Any], Path]
) -> None:
    names = (root / "train.image.tok").read_text().split() * 20
    for name in ("image", "report", "label"):
        write(f"train.{name}.tok", names)
    (root / "images" / "broken.png").write_bytes(b"nothing")
    write("train.image.tok", ["broken.png", *names[1:]])
    data = images(runtime, on_error="skip")

    cache_tokens(data, Model(), CPU, 0)

    assert sum(len(tokens) for tokens in batches(data)) == len(names) - 1


@pytest.mark.parametrize("options", [{"preset": "resize_crop"}, {"multi_image": 2}])
def test_images_that_vary_are_refused(
    runtime: Callable[..., dict[str, Any]], options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="center_crop"):
        cache_tokens(images(runtime, **options), Model(), CPU, 0)


def test_models_without_a_vae_are_refused(runtime: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.image\.tokens"):
        cache_tokens(images(runtime), object(), CPU, 0)
    cache_tokens(images(runtime, tokens=None), object(), CPU, 0)
