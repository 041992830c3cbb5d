from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small_dalles import TINY_VAE
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.datasets.token_file import cache_tokens
from vilmedic.errors import ConfigError, DataError
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
    [path] = (tmp_path / "run" / "tokens").glob("train_*.npy")
    stamp = path.stat().st_mtime_ns

    again = images(runtime)
    cache_tokens(again, model, CPU, 0)
    assert path.stat().st_mtime_ns == stamp
    cache_tokens(images(runtime), Model(seed=1), CPU, 0)
    cache_tokens(images(runtime, mean=[0.1]), model, CPU, 0)
    assert len(list(path.parent.glob("train_*.npy"))) == 3
    model.vae = VAE(**TINY_VAE, normalization=[[0.2] * 3, [0.1] * 3]).eval()
    model.vae.load_state_dict(Model().vae.state_dict())
    cache_tokens(images(runtime), model, CPU, 0)
    assert len(list(path.parent.glob("train_*.npy"))) == 4


def test_images_replaced_in_place_get_tokens_of_their_own(
    runtime: Callable[..., dict[str, Any]], root: Path
) -> None:
    model = Model()
    first = images(runtime)
    cache_tokens(first, model, CPU, 0)
    before = torch.cat(batches(first))
    names = (root / "train.image.tok").read_text().split()
    for number, name in enumerate(names):
        file = root / "images" / name
        times = file.stat()
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24), np.uint8)
        Image.fromarray(pixels).save(file)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    again = images(runtime)
    cache_tokens(again, model, CPU, 0)

    after = torch.cat(batches(again))
    plain = images(runtime, tokens=None)
    for row, line in zip(after, range(len(names)), strict=True):
        pixels = plain.finish({"images": plain.images(line)[0][None]})["images"]
        assert torch.equal(row[None], model.vae.get_codebook_indices(pixels))
    assert not torch.equal(before, after)


def test_images_that_moved_keep_their_tokens(
    runtime: Callable[..., dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    model = Model()
    cache_tokens(images(runtime), model, CPU, 0)
    shutil.move(root / "images", tmp_path / "elsewhere")
    moved = images(runtime, image_path=str(tmp_path / "elsewhere"))
    cache_tokens(moved, model, CPU, 0)
    assert len(list((tmp_path / "run" / "tokens").glob("train_*.npy"))) == 1


def test_images_that_change_meanwhile_are_no_tokens(
    runtime: Callable[..., dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    name = (root / "train.image.tok").read_text().split()[0]

    class Changing(Model):
        def __init__(self) -> None:
            super().__init__()
            compute = self.vae.get_codebook_indices

            def changing(pixels: torch.Tensor) -> torch.Tensor:
                Image.new("L", (20, 20), 7).save(root / "images" / name)
                return compute(pixels)

            self.vae.get_codebook_indices = changing  # type: ignore[method-assign]

    with pytest.raises(DataError, match="were changed while image tokens were made"):
        cache_tokens(images(runtime), Changing(), CPU, 0)
    files = list((tmp_path / "run" / "tokens").iterdir())
    assert [file for file in files if not file.name.startswith(".contents")] == []


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
