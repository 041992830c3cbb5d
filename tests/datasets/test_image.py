from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.datasets.dicom_files import make_dicom, table
from vilmedic.datasets import image_source
from vilmedic.datasets.aligned import SampleKey
from vilmedic.datasets.decode import UndecodableImage, decode_image
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.errors import DataError

Args = Callable[..., dict[str, Any]]
Write = Callable[[str, Sequence[str]], Path]


def load(dataset: ImageDataset, *indices: int, epoch: int = 0) -> dict[str, Any]:
    return dataset.collate([dataset[SampleKey(index, epoch)] for index in indices])


def test_batch_is_uint8_and_prepared_images_are_normalised(image_args: Args) -> None:
    dataset = ImageDataset(**image_args(training=False, mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.4]))
    batch = load(dataset, 2, 0)
    assert batch["index"].tolist() == [2, 0]
    assert batch["images"].shape == (2, 1, 12, 12)
    assert batch["images"].dtype == torch.uint8
    images = dataset.prepare(batch)["images"]
    assert images.shape == (2, 3, 12, 12)
    assert images.dtype == torch.float32
    grey = batch["images"][:, 0].double() / 255
    for channel, (mean, std) in enumerate([(0.5, 0.1), (0.4, 0.2), (0.3, 0.4)]):
        assert torch.allclose(images[:, channel].double(), (grey - mean) / std, atol=1e-5)


def test_evaluation_uses_a_centre_crop(image_args: Args, root: Path) -> None:
    dataset = ImageDataset(**image_args(training=False, resize=None))
    whole = decode_image(root / "images" / "train_3.png")
    assert torch.equal(load(dataset, 3)["images"][0], whole[:, 4:16, 2:14])
    assert dataset.describe(3) == {"image": [str(root / "images" / "train_3.png")]}
    assert dataset.lines(torch.tensor([3])) == [f"{root}/train.image.tok:4"]


def test_a_centre_crop_is_the_same_in_training_and_evaluation(image_args: Args) -> None:
    plain = {"preset": "center_crop", "mean": [0.0], "std": [1.0]}
    training = ImageDataset(**image_args(training=True, **plain))
    evaluation = ImageDataset(**image_args(training=False))
    batch = load(training, *range(5), epoch=3)
    assert torch.equal(batch["images"], load(evaluation, *range(5))["images"])
    images = training.prepare(batch)["images"]
    assert images.shape[1] == 3
    torch.testing.assert_close(images[:, 2], batch["images"][:, 0] / 255, rtol=0, atol=1e-7)


@pytest.mark.parametrize("preset", ["resize_crop", "convirt", "simclr", "simclr_xray"])
def test_augmentation_depends_only_on_seed_epoch_and_sample(image_args: Args, preset: str) -> None:
    def images(dataset: ImageDataset, *indices: int, epoch: int = 0) -> torch.Tensor:
        return dataset.prepare(load(dataset, *indices, epoch=epoch))["images"]

    dataset = ImageDataset(**image_args(preset=preset))
    state = torch.get_rng_state()
    first = [images(dataset, *range(8), epoch=epoch) for epoch in range(6)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    other = ImageDataset(**image_args(preset=preset))
    again = [images(other, *range(8), epoch=epoch) for epoch in (5, 4, 3, 2, 1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(images(other, 6, 3, epoch=2), first[2][[6, 3]])
    reseeded = ImageDataset(**image_args(preset=preset, seed=2))
    assert not torch.equal(images(reseeded, *range(8)), first[0])


@pytest.mark.parametrize("preset", ["resize_crop", "convirt", "simclr"])
def test_images_of_a_line_equal_those_of_its_batch(image_args: Args, preset: str) -> None:
    plain = {"mean": [0.0], "std": [1 / 255], "views": 2}
    dataset = ImageDataset(**image_args(preset=preset, **plain))
    batch = dataset.prepare(load(dataset, 3, 1, epoch=4))
    assert set(batch) == {"index", "images"}
    for row, line in enumerate((3, 1)):
        expected = torch.stack(dataset.images(line, 4))
        assert torch.equal(batch["images"][row, :, :1], expected.float())


@pytest.mark.parametrize("preset", ["convirt", "simclr"])
def test_loading_processes_do_not_change_augmented_images(image_args: Args, preset: str) -> None:
    def images(batch_size: int, num_workers: int) -> torch.Tensor:
        dataset = ImageDataset(**image_args(preset=preset, views=2))
        loader = make_loader(
            dataset, batch_size=batch_size, training=True, seed=0, num_workers=num_workers
        )
        return torch.cat([dataset.prepare(batch)["images"] for batch in loader])

    assert torch.equal(images(3, 0), images(4, 2))


def test_evaluation_is_the_same_in_every_epoch(image_args: Args) -> None:
    for changes in ({}, {"views": 2, "preset": "simclr"}):
        dataset = ImageDataset(**image_args(training=False, **changes))
        one, other = (dataset.prepare(load(dataset, 0, epoch=epoch)) for epoch in (0, 7))
        assert torch.equal(one["images"], other["images"])


def test_views_differ_from_each_other(image_args: Args) -> None:
    for training in (True, False):
        dataset = ImageDataset(**image_args(training=training, views=3, preset="simclr"))
        batch = load(dataset, 0, 1)
        assert batch["images"].shape == (2, 3, 1, 12, 12)
        assert batch["augmentation"].shape[:2] == (2, 3)
        prepared = dataset.prepare(batch)["images"]
        assert prepared.shape == (2, 3, 3, 12, 12)
        assert not torch.equal(prepared[0, 0], prepared[0, 1])


def test_several_images_are_padded_and_masked(image_args: Args, write: Write) -> None:
    write("train.image.tok", ["train_0.png,train_1.png, train_2.png,train_3.png", "train_4.png"])
    dataset = ImageDataset(**image_args(multi_image=3, training=False))
    batch = load(dataset, 0, 1)
    assert batch["images"].shape == (2, 3, 1, 12, 12)
    assert batch["images_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["images"][1, 1:].sum() == 0
    single = ImageDataset(**image_args(training=False))
    assert torch.equal(load(single, 0, 1)["images"], batch["images"][:, 0])
    assert "images_mask" not in load(single, 0)
    assert len(dataset.describe(0)["image"]) == 3
    augmented = ImageDataset(**image_args(multi_image=3, preset="convirt", mean=[0.0]))
    prepared = augmented.prepare(load(augmented, 0, 1))["images"]
    assert prepared.shape == (2, 3, 3, 12, 12)
    assert prepared[1, 1:].abs().sum() == 0
    assert prepared[0].flatten(1).sum(1).min() > 0


STUDIES = ["train_0.png,train_1.png,train_2.png,train_3.png", "train_4.png"]


def test_a_study_image_is_drawn_by_seed_epoch_and_sample(
    image_args: Args, write: Write, tmp_path: Path
) -> None:
    write("train.image.tok", STUDIES)
    settings = image_args(multi_image=3, image_choice="random", preset="center_crop")
    dataset = ImageDataset(**settings)
    every = ImageDataset(**image_args(multi_image=3, training=False))[0]["images"]

    def place(image: torch.Tensor) -> int:
        return next(n for n, one in enumerate(every) if torch.equal(one, image))

    drawn = [place(dataset[SampleKey(0, epoch)]["images"][0]) for epoch in range(40)]
    assert set(drawn) == {0, 1, 2}  # multi_image uses the first three of the four
    again = ImageDataset(**settings)
    late = [place(again[SampleKey(0, epoch)]["images"][0]) for epoch in range(11, 40)]
    assert late == drawn[11:]
    cached = ImageDataset(**settings, cache=str(tmp_path / "cache"))
    assert drawn == [place(cached[SampleKey(0, n)]["images"][0]) for n in range(40)]
    batch = load(dataset, 0, 1)
    assert batch["images"].shape == (2, 1, 12, 12)
    assert "images_mask" not in batch
    evaluated = ImageDataset(**{**settings, "training": False})
    assert {place(evaluated[SampleKey(0, n)]["images"][0]) for n in range(20)} == {0}


@pytest.mark.parametrize("training", [True, False])
def test_views_are_of_different_images_of_a_study(
    image_args: Args, write: Write, training: bool
) -> None:
    write("train.image.tok", STUDIES)
    settings = image_args(multi_image=4, image_choice="random", views=2, training=training)
    dataset = ImageDataset(**settings)
    pairs = [tuple(dataset.chosen(0, epoch) or ()) for epoch in range(60)]
    assert all(first != second for first, second in pairs)
    assert len(set(pairs)) == (12 if training else 1)  # evaluation is the same in every epoch
    assert dataset.chosen(1, 5) == [0, 0]
    assert load(dataset, 0, 1)["images"].shape == (2, 2, 1, 12, 12)


def test_views_of_every_image_of_a_study(image_args: Args, write: Write) -> None:
    write("train.image.tok", STUDIES)
    dataset = ImageDataset(**image_args(multi_image=3, views=2, preset="simclr", mean=[0.0]))
    batch = load(dataset, 0, 1)
    assert batch["images"].shape == (2, 3, 2, 1, 12, 12)
    assert batch["augmentation"].shape[:3] == (2, 3, 2)
    assert batch["images_mask"].tolist() == [[True] * 3, [True, False, False]]
    prepared = dataset.prepare(batch)["images"]
    assert prepared[1, 1:].abs().sum() == 0
    assert not torch.equal(prepared[0, 0, 0], prepared[0, 0, 1])
    alone = ImageDataset(**image_args(views=2, preset="simclr", mean=[0.0]))
    assert torch.equal(alone.prepare(load(alone, 0, 1))["images"], prepared[:, 0])


def test_colour_images_keep_three_channels(image_args: Args) -> None:
    dataset = ImageDataset(**image_args(color="rgb"))
    batch = load(dataset, 0)
    assert batch["images"].shape == (1, 3, 12, 12)
    assert dataset.prepare(batch)["images"].shape == (1, 3, 12, 12)


def test_extension_is_added_to_names_without_one(
    image_args: Args, write: Write, root: Path
) -> None:
    write("train.image.tok", ["train_0", "1.2.840.5", "train_1.png"])
    Image.new("L", (20, 20)).save(root / "images" / "1.2.840.5.png")
    for ext in ("png", ".png"):
        dataset = ImageDataset(**image_args(ext=ext))
        names = [Path(dataset.describe(index)["image"][0]).name for index in range(3)]
        assert names == ["train_0.png", "1.2.840.5.png", "train_1.png"]


def test_image_path(image_args: Args, root: Path) -> None:
    (root / "images").rename(root / "scans")
    dataset = ImageDataset(**image_args(image_path=str(root / "scans")))
    assert len(dataset) == 8
    for file in (root / "scans").iterdir():
        file.rename(root / file.name)
    assert len(ImageDataset(**image_args())) == 8


def test_missing_images_are_found_at_construction(image_args: Args, root: Path) -> None:
    for number in range(1, 8):
        (root / "images" / f"train_{number}.png").unlink()
    expected = r"7 missing images: \S+train\.image\.tok:2: \S+train_1\.png does .* and 2 more\."
    with pytest.raises(DataError, match=expected):
        ImageDataset(**image_args())


def test_dicom_is_read(image_args: Args, write: Write, root: Path) -> None:
    write("train.image.tok", ["train_0", "scan"])
    ramp = np.linspace(0, 4000, 320).reshape(20, 16).astype(np.uint16)
    for name in ("train_0", "scan"):
        make_dicom(root / "images" / f"{name}.dcm", ramp)
    dataset = ImageDataset(**image_args(ext=".dcm", training=False))
    images = load(dataset, 0, 1)["images"]
    assert images.shape == (2, 1, 12, 12)
    assert images.max() > images.min() + 100


def test_dicom_without_its_package_is_refused_at_construction(
    image_args: Args, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_source, "dicom_available", lambda: False)
    write("train.image.tok", ["train_0.png", "scan.dcm"])
    with pytest.raises(DataError, match=r"tok:2: \S+scan\.dcm: DICOM files need pydicom"):
        ImageDataset(**image_args(on_error="skip"))


def test_line_without_a_path_is_an_error(image_args: Args, write: Write) -> None:
    write("train.image.tok", ["train_0.png", ","])
    with pytest.raises(DataError, match=r"tok:2 names no image"):
        ImageDataset(**image_args())


def test_undecodable_image_names_its_line(image_args: Args, root: Path) -> None:
    path = root / "images" / "train_2.png"
    path.write_bytes(path.read_bytes()[:100])
    dataset = ImageDataset(**image_args())
    with pytest.raises(UndecodableImage, match=r"train\.image\.tok:3: \S+train_2\.png cannot be"):
        dataset[SampleKey(2)]


def test_skip_drops_missing_images_and_keeps_line_numbers(
    image_args: Args, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("train.image.tok", ["train_0.png"] * 99 + ["gone.png"] + ["train_1.png"] * 100)
    dataset = ImageDataset(**image_args(on_error="skip"))
    assert len(dataset) == 199
    assert dataset.lines([98, 99])[1].endswith("train.image.tok:101")
    assert list(dataset.skipped) == [99]
    with caplog.at_level(logging.WARNING):
        dataset.report_skipped()
        dataset.report_skipped()
    assert len(caplog.messages) == 1
    assert "gone.png does not exist (1 of 200 so far)" in caplog.messages[0]


def test_skip_stops_above_one_percent(image_args: Args, write: Write) -> None:
    write("train.image.tok", ["train_0.png"] * 197 + ["a.png", "b.png", "c.png"])
    with pytest.raises(DataError, match=r"3 bad samples.*more than 1% of the 200 samples"):
        ImageDataset(**image_args(on_error="skip"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transforms": [{"ToDtype": {"dtype": torch.float32}}]}, "ToDtype makes torch.float32"),
        ({"transforms": [{"Grayscale": {"num_output_channels": 3}}]}, "as the key color asks"),
        ({"transforms": ["ToPILImage"]}, "ToPILImage makes Image"),
        ({"transforms": [{"CenterCrop": {"size": 8}}]}, "too small for crop=12"),
        ({"transforms": [{"RandomRotate": {}}]}, "Did you mean 'RandomRotation'"),
        ({"transforms": [], "preset": "convirt"}, "exclude each other"),
        ({"image_choice": "random"}, "Set multi_image"),
        ({"views": 2, "preset": "center_crop"}, "make all views of an image alike"),
        ({"views": 2, "crop": None}, "make all views of an image alike"),
        ({"views": 2, "eval_transforms": [], "training": False}, "make all views of an image"),
        ({"preset": "convirt", "crop": None}, "crop is null"),
    ],
)
def test_wrong_arguments_are_refused(
    image_args: Args, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset(**image_args(**changes))


def test_list_of_transforms_for_each_use(image_args: Args, root: Path) -> None:
    changes = {
        "transforms": [{"RandomInvert": {"p": 1.0}}],
        "eval_transforms": [{"RandomSolarize": {"threshold": 0, "p": 1.0}}],
        "crop": None,
        "resize": None,
    }
    whole = decode_image(root / "images" / "train_0.png")
    for training in (True, False):
        dataset = ImageDataset(**image_args(training=training, **changes))
        assert torch.equal(load(dataset, 0)["images"][0], 255 - whole)
        assert type(dataset.pixels.transforms[0]).__name__ == (
            "RandomInvert" if training else "RandomSolarize"
        )


def test_image_smaller_than_the_crop_names_its_line(image_args: Args) -> None:
    dataset = ImageDataset(**image_args(resize=None, crop=18))
    with pytest.raises(DataError, match=r"tok:2: an image of 20 x 16 pixels is too small"):
        dataset[SampleKey(1)]


def test_different_sizes_in_a_batch_are_an_error(image_args: Args, root: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "images" / "train_1.png")
    dataset = ImageDataset(**image_args(resize=None, crop=None))
    with pytest.raises(DataError, match=r"found 20 x 16 \(sample 0\), 9 x 9 \(sample 1\)"):
        load(dataset, 0, 1)


def test_keep_sides_removes_horizontal_flips(
    image_args: Args, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = ImageDataset(**image_args(preset="convirt"))
    assert dataset.pixels.augmentation is not None
    assert dataset.pixels.augmentation.flip
    dataset.keep_sides()
    assert not dataset.pixels.augmentation.flip
    assert not caplog.messages
    own = ImageDataset(**image_args(transforms=["RandomHorizontalFlip"]))
    own.keep_sides()
    assert len(own.pixels.transforms) == 1
    assert len(caplog.messages) == 1


def test_too_large_images_are_refused(image_args: Args, root: Path) -> None:
    with pytest.raises(UndecodableImage, match=r"tok:1: .* has 20 x 16 pixels.*max_pixels=319"):
        load(ImageDataset(**image_args(max_pixels=319)), 0)
    with pytest.raises(
        UndecodableImage, match=r"resized to 40, has 50 x 40 pixels.*max_pixels=1000"
    ):
        load(ImageDataset(**image_args(max_pixels=1000, resize=40)), 0)
    assert load(ImageDataset(**image_args(max_pixels=2000, resize=40)), 0)["images"].shape[-1] == 12


def test_contradicting_headers_are_logged_once(
    image_args: Args,
    write: Write,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vilmedic.datasets.image_source._noted", [])
    lut = table(list(range(4096)), 0, 16)
    for name in ("a.dcm", "b.dcm"):
        values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
        make_dicom(root / "images" / name, values, VOILUTSequence=[lut])
    write("train.image.tok", ["a.dcm", "b.dcm"])
    load(ImageDataset(**image_args()), 0, 1)
    [message] = caplog.messages
    assert re.search(r"a\.dcm: its VOI table states 16 bits and holds 12\. Further", message)
