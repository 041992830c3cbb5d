from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.full_disk import no_file_beyond
from tests.small_dalles import TINY_VAE
from tests.small_models import tiny_cnn, tiny_encoder
from vilmedic.blocks.projection import PairedProjection
from vilmedic.datasets import token_file
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.datasets.pairs import ImSeq
from vilmedic.datasets.text import ReportTokens, TextDataset
from vilmedic.datasets.token_file import cache_features, cache_tokens
from vilmedic.errors import ConfigError, DataError
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.vae import VAE
from vilmedic.training.health import duplicates

CPU = torch.device("cpu")


class Model:
    """The parts of a model that the cache uses."""

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


def test_cached_tokens_equal_those_of_the_images(runtime: Callable[..., dict[str, Any]]) -> None:
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


def test_replaced_images_get_new_tokens(runtime: Callable[..., dict[str, Any]], root: Path) -> None:
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


def test_moved_images_keep_their_tokens(
    runtime: Callable[..., dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    model = Model()
    cache_tokens(images(runtime), model, CPU, 0)
    shutil.move(root / "images", tmp_path / "elsewhere")
    moved = images(runtime, image_path=str(tmp_path / "elsewhere"))
    cache_tokens(moved, model, CPU, 0)
    assert len(list((tmp_path / "run" / "tokens").glob("train_*.npy"))) == 1


def test_images_that_change_during_tokenizing_are_an_error(
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


def test_an_undecodable_image_is_still_reported(
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
def test_augmented_images_are_refused(
    runtime: Callable[..., dict[str, Any]], options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="center_crop"):
        cache_tokens(images(runtime, **options), Model(), CPU, 0)


def test_models_without_a_vae_are_refused(runtime: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.image\.tokens"):
        cache_tokens(images(runtime), object(), CPU, 0)
    cache_tokens(images(runtime, tokens=None), object(), CPU, 0)


def pairs(runtime: Callable[..., dict[str, Any]], split: str = "train", **options: Any) -> ImSeq:
    """Images of 32 pixels with their reports, without randomness."""
    training = split == "train"
    given = runtime("seed", "run_dir", split=split, training=training)
    image = {"resize": 32, "crop": 32, "preset": "center_crop"} | options
    seq = {"tokenizer_max_len": image.pop("tokenizer_max_len", 16)}
    seq |= {"sample_sentence": image.pop("sample_sentence", False)}
    given.pop("run_dir")
    text = TextDataset(**runtime("training", "seed", "run_dir"), **seq)
    return ImSeq(image=ImageDataset(**given, **image), seq=text)


def frozen(data: ImSeq, *, seed: int = 0, **settings: Any) -> ConVIRT:
    """A ConVIRT with only the heads trained."""
    torch.manual_seed(seed)
    parts = {"cnn": {"freeze": True}, "encoder": {"freeze": True}} | settings
    return ConVIRT(
        spec=data.spec,
        cnn=tiny_cnn(**parts["cnn"]),
        encoder=tiny_encoder(data.spec, **parts["encoder"]),
        projection=PairedProjection(
            visual_embedding_dim=1024, textual_embedding_dim=16, projection_dim=8
        ),
        loss=ConVIRTLoss(),
    )


def keep(data: ImSeq, model: ConVIRT, folder: Path, **options: Any) -> list[str]:
    """Cache features; return the parts of the data set that now return them."""
    given = {"precision": "fp32", "gib": 1.0, "folder": folder, "num_workers": 0} | options
    cache_features(data, model, CPU, **given)
    return [part.rows[0] for part in data.parts if part.rows is not None]


def encoded(data: ImSeq, model: ConVIRT, size: int) -> dict[str, torch.Tensor]:
    """The encoder outputs of all samples in training."""
    model.train()
    found: dict[str, list[torch.Tensor]] = {}
    for batch in make_loader(data, batch_size=size, training=False, seed=0, num_workers=0):
        batch = data.prepare(batch)
        for name, tower in model.towers().items():
            value = batch[name] if name in batch else tower.encode(batch)
            found.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_equal_those_of_the_frozen_encoders(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path, precision: str
) -> None:
    plain, data = pairs(runtime), pairs(runtime)
    model = frozen(data)
    assert keep(data, model, tmp_path, precision=precision) == list(model.towers())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for size in (8, 3):
            found, expected = encoded(data, model, size), encoded(plain, model, size)
            for name, value in expected.items():
                assert found[name].dtype == value.dtype
                # Another batch size or padding changes the rounding.
                bound = 2e-6 if value.dtype == torch.float32 else 2e-2
                bound *= float(value.abs().max())
                torch.testing.assert_close(found[name], value, rtol=0, atol=bound)


def test_features_with_equal_batch_sizes_are_bit_identical(
    runtime: Callable[..., dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    for name in ("image", "report"):
        path = root / f"train.{name}.tok"
        path.write_text(path.read_text() * 8)  # two batches of 32
    plain, data = pairs(runtime), pairs(runtime)
    model = frozen(data)
    keep(data, model, tmp_path)
    found, expected = encoded(data, model, 32), encoded(plain, model, 32)
    assert len(expected) == 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_images_are_read_once(
    runtime: Callable[..., dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    data = pairs(runtime)
    keep(data, frozen(data), tmp_path)
    shutil.rmtree(root / "images")
    [batch] = make_loader(data, batch_size=8, training=True, seed=0, num_workers=0)
    assert "images" not in batch
    assert batch["image_features"].shape == (8, 1024)
    assert set(batch) == {"index", "image_features", "report_features", "token_hash"}


def test_reports_are_encoded_once_and_still_distinguished(
    runtime: Callable[..., dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    """Equal reports are still positives of each other and counted as duplicates."""
    lines = ["no effusion", "no  effusion", "small left effusion today", "small left effusion"] * 2
    (root / "train.report.tok").write_text("\n".join(lines))
    options = {"tokenizer_max_len": 5}  # cuts the third
    plain, data = pairs(runtime, **options), pairs(runtime, **options)
    model = frozen(data)
    keep(data, model, tmp_path)
    for one in (plain, data):
        next(part for part in one.parts if isinstance(part, TextDataset)).hashes = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReportTokens, "tokens_of", raising(AssertionError("tokenized again")))
        samples = [data[number] for number in range(8)]
        batch = data.collate(samples)
    expected = plain.collate([plain[number] for number in range(8)])
    assert torch.equal(batch["report_hash"], expected["report_hash"])
    assert len(batch["report_hash"].unique()) < 8
    assert duplicates(batch["token_hash"]) == duplicates(expected["input_ids"]) > 0
    cut = [plain[number]["truncated"] for number in range(8)]
    assert [sample["truncated"] for sample in samples] == cut
    assert any(cut)


def test_tokens_are_kept_for_a_model_that_reads_them(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    data = pairs(runtime)
    model = frozen(data)
    model.reads_tokens = True  # as with soft targets by reports
    assert "report_features" in keep(data, model, tmp_path)
    assert {"input_ids", "report_features"} <= set(data.collate([data[0], data[1]]))


def test_features_are_computed_once_per_combination_of_inputs(
    runtime: Callable[..., dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "features"

    def count(kind: str, model: ConVIRT | None = None, **options: Any) -> int:
        """The number of files after caching features again."""
        own = {key: options.pop(key) for key in ("precision",) if key in options}
        data = pairs(runtime, **options)
        keep(data, model or frozen(data), tmp_path, **own)
        return len(list(folder.glob(f"train_{kind}_features_*.npy")))

    assert count("image") == count("image") == 1
    assert count("image", crop=24) == 2
    assert count("image", mean=[0.1]) == 3
    assert count("image", precision="bf16") == 4
    assert count("image", frozen(pairs(runtime), seed=1)) == 5
    assert count("image", eval_transforms=[{"Grayscale": None}]) == 6
    layer = frozen(pairs(runtime), cnn={"freeze": True, "output_layer": "conv5"})
    assert count("image", layer) == 7
    assert count("image", multi_image=2) == 8
    Image.new("L", (20, 16), 9).save(root / "images" / "train_3.png")
    assert count("image") == 9
    before = count("report")
    highest = frozen(pairs(runtime), encoder={"freeze": True, "pooling": "max"})
    assert count("report", highest) == before + 1
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    (root / "train.report.tok").write_text("Another one.\n" * 8)
    assert count("report") == before + 2


def test_partly_trained_or_augmented_parts_are_computed_in_each_epoch(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    image, report = "image_features", "report_features"
    data = pairs(runtime)
    model = frozen(data, cnn={}, encoder={})
    model.cnn.freeze_until("stage2")
    assert keep(data, model, tmp_path) == []
    still = frozen(data, cnn={})
    still.cnn.requires_grad_(False)  # but its batch statistics are updated
    assert keep(pairs(runtime), still, tmp_path) == [report]
    random = {"eval_transforms": [{"RandomRotation": {"degrees": 3}}]}
    for options in ({"preset": "resize_crop"}, random):
        caplog.clear()
        assert keep(pairs(runtime, **options), frozen(data), tmp_path) == [report]
        assert "It is computed once with preset=center_crop" in caplog.text
    assert keep(pairs(runtime, sample_sentence=True), frozen(data), tmp_path) == [image]
    drawn = {"multi_image": 2, "image_choice": "random"}
    assert keep(pairs(runtime, **drawn), frozen(data), tmp_path) == [report]
    assert keep(pairs(runtime), frozen(data), tmp_path, gib=0) == []


def test_output_dropout_is_the_same_with_cached_features(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    plain, data = pairs(runtime), pairs(runtime)
    model = frozen(data, cnn={"freeze": True, "dropout_out": 0.5})
    assert "image_features" in keep(data, model, tmp_path)
    several = pairs(runtime, multi_image=2)
    assert keep(several, model, tmp_path) == ["report_features"]
    features = []
    for one in (plain, data):
        [batch] = make_loader(one, batch_size=8, training=False, seed=0, num_workers=0)
        torch.manual_seed(3)
        features.append(model.train().encode(one.prepare(batch))["visual"])
    torch.testing.assert_close(features[1], features[0], rtol=1e-5, atol=1e-5)


def test_several_images_of_a_sample_form_one_row(
    runtime: Callable[..., dict[str, Any]], write: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    write("train.image.tok", ["train_0.png,train_1.png", *[f"train_{i}.png" for i in range(1, 8)]])
    plain, data = pairs(runtime, multi_image=2), pairs(runtime, multi_image=2)
    model = frozen(data)
    assert "image_features" in keep(data, model, tmp_path)
    found, expected = encoded(data, model, 8), encoded(plain, model, 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_the_selected_samples_are_computed(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    plain, data = pairs(runtime), pairs(runtime)
    for one in (plain, data):
        one.kept = np.array([6, 1, 4])
    model = frozen(data)
    keep(data, model, tmp_path)
    [path] = (tmp_path / "features").glob("train_image_*.npy")
    assert np.load(path).shape == (3, 1024)
    found, expected = encoded(data, model, 3), encoded(plain, model, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_damaged_file_is_computed_again(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = pairs(runtime)
    model = frozen(data)
    keep(data, model, tmp_path)
    [path] = (tmp_path / "features").glob("train_image_*.npy")
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for damaged in (bytes(changed), whole[:-7], whole + b"x", b""):
        path.write_bytes(damaged)
        caplog.clear()
        again = pairs(runtime)
        assert "image_features" in keep(again, model, tmp_path)
        assert f"{path} is damaged" in caplog.text
        assert path.read_bytes() == whole


def test_features_that_cannot_be_written_are_computed_in_each_epoch(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = pairs(runtime)
    model = frozen(data)
    with no_file_beyond(8192):  # too small for images, enough for reports
        assert keep(data, model, tmp_path) == ["report_features"]
    assert "image encoder, split train, are not kept: File too large" in caplog.text
    assert not list((tmp_path / "features").glob("*image*"))
    caplog.clear()
    assert keep(data, model, tmp_path) == ["report_features"]  # and not tried again
    assert caplog.text == ""
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_file._Rows, "_write", raising(full))
        (tmp_path / "other").mkdir()
        assert keep(pairs(runtime), model, tmp_path / "other") == []
    assert "are not kept: the disk is full (" in caplog.text
    assert "They are computed in every epoch." in caplog.text


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_features_respect_the_size_limit(
    runtime: Callable[..., dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, size = pairs(runtime), 8 * 1024 * 4
    assert keep(data, frozen(data), tmp_path, gib=size / 2 / 2**30) == ["report_features"]
    assert "they take 0.0 MiB, more than trainor.frozen_cache_gib=1.52588e-05 leaves" in caplog.text
    room = 2.5 * size / 2**30
    files = []
    for seed in range(4):
        monkeypatch.setattr(token_file, "_in_use", set())  # as in another process
        again = pairs(runtime)
        model = frozen(again, seed=seed, encoder={})
        assert keep(again, model, tmp_path, gib=room) == ["image_features"]
        files.append({path.name for path in (tmp_path / "features").glob("*_image_*.npy")})
    assert [len(names) for names in files] == [1, 2, 2, 2]
    assert not files[0] & files[3]  # the oldest were removed


def test_non_finite_features_are_not_cached(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = pairs(runtime)
    model = frozen(data)
    with torch.no_grad():
        next(model.cnn.network.parameters()).fill_(float("nan"))
    assert keep(data, model, tmp_path) == ["report_features"]
    assert "not kept: they hold values that are not finite" in caplog.text


def test_leftovers_of_a_killed_process_are_removed(
    runtime: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    old, new = folder / ".a.npy.1.tmp", folder / ".a.npy.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    data = pairs(runtime)
    keep(data, frozen(data), tmp_path)
    assert not old.exists()
    assert new.exists()
