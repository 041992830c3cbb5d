from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vilmedic.datasets import image_cache
from vilmedic.datasets.aligned import SampleKey
from vilmedic.datasets.decode import UndecodableImage, decode_image
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.errors import DataError
from vilmedic.phantom.case import draw_case
from vilmedic.phantom.render import render

Args = Callable[..., dict[str, Any]]
Write = Callable[[str, Sequence[str]], Path]


@pytest.fixture
def cached(image_args: Args, tmp_path: Path) -> Callable[..., ImageDataset]:
    def make(**changes: Any) -> ImageDataset:
        return ImageDataset(**image_args(cache=str(tmp_path / "cache"), **changes))

    return make


def caches(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").iterdir() if path.is_dir())


def batches(dataset: ImageDataset, **settings: Any) -> list[torch.Tensor]:
    given = {"batch_size": 3, "training": True, "seed": 4, "epoch": 1, "num_workers": 0} | settings
    return [batch["images"] for batch in make_loader(dataset, **given)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preset": "simclr", "views": 2},
        {"color": "rgb"},
        {"resize": None},
        {"training": False},
        {"crop": None, "resize": None, "training": False},
        {"transforms": [{"RandomErasing": {"p": 1.0, "inplace": True}}]},
    ],
)
def test_cached_samples_are_bit_identical(
    cached: Callable[..., ImageDataset], image_args: Args, changes: dict[str, Any]
) -> None:
    plain = ImageDataset(**image_args(**changes))
    for num_workers in (0, 2) if not changes else (0,):
        for _ in range(2):
            pairs = zip(
                batches(cached(**changes), num_workers=num_workers), batches(plain), strict=True
            )
            assert all(torch.equal(one, other) for one, other in pairs)


def test_sizes_may_differ_and_lines_may_share_images(
    cached: Callable[..., ImageDataset], image_args: Args, write: Write, root: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 21), dtype=np.uint8)).save(
        root / "images" / "tall.png"
    )
    write("train.image.tok", ["tall.png,train_0.png", "train_0.png", "train_1.png,tall.png"])
    changes = {"multi_image": 2, "training": False}
    one, other = cached(**changes), ImageDataset(**image_args(**changes))
    for index in range(3):
        a, b = one[SampleKey(index)]["images"], other[SampleKey(index)]["images"]
        assert len(a) == len(b)
        assert all(map(torch.equal, a, b))
    [folder] = caches(tmp_path)
    card = json.loads((folder / "card.json").read_text())
    assert card["images"] == 3
    assert card["bytes"] == (folder / "pixels.u8").stat().st_size == 14 * 26 + 2 * 14 * 17
    assert one.describe(0) == other.describe(0)


def test_files_are_decoded_once(
    cached: Callable[..., ImageDataset], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = batches(cached())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("vilmedic.datasets.image_source.decode_file", refuse)
    assert all(map(torch.equal, first, batches(cached())))
    with pytest.raises(AssertionError, match="decoded again"):
        cached(resize=13)


@pytest.mark.parametrize("change", ["content", "settings", "lines"])
def test_changed_content_or_settings_give_a_new_cache(
    cached: Callable[..., ImageDataset],
    image_args: Args,
    write: Write,
    root: Path,
    tmp_path: Path,
    change: str,
) -> None:
    cached()
    changes: dict[str, Any] = {"resize": 15} if change == "settings" else {}
    if change == "content":
        Image.fromarray(np.full((20, 16), 77, np.uint8)).save(root / "images" / "train_0.png")
    if change == "lines":
        write("train.image.tok", [f"train_{n}.png" for n in (3, 1, 0)])
    pairs = zip(
        batches(cached(**changes)), batches(ImageDataset(**image_args(**changes))), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs)
    assert len(caches(tmp_path)) == 2


def test_moved_or_touched_files_are_not_decoded_again(
    cached: Callable[..., ImageDataset],
    write: Write,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many(write, root, bad=1)
    changes: dict[str, Any] = {"on_error": "skip"}
    first = cached(**changes)
    expected = batches(first)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("vilmedic.datasets.image_source.decode_file", refuse)
    os.utime(root / "images" / "train_0.png", (1, 1))
    assert all(map(torch.equal, expected, batches(cached(**changes))))
    moved = tmp_path / "elsewhere"
    shutil.copytree(root / "images", moved)
    second = cached(image_path=str(moved), **changes)
    assert all(map(torch.equal, expected, batches(second)))
    [(line, old)], [(other, new)] = first.skipped.items(), second.skipped.items()
    assert line == other
    assert new == old.replace(str(root / "images"), str(moved))
    assert len(caches(tmp_path)) == 1


def test_changed_content_with_the_same_size_and_time_is_decoded(
    cached: Callable[..., ImageDataset], image_args: Args, root: Path, tmp_path: Path
) -> None:
    """Also if the digests of the files are stored from an earlier run."""
    path = root / "images" / "train_0.png"
    pixels = np.zeros((20, 16), np.uint8)
    kept = []
    for number in (7, 9):
        pixels[3, 3] = number
        Image.fromarray(pixels).save(path, compress_level=0)
        os.utime(path, ns=(10**18, 10**18))
        kept.append((path.stat().st_size, path.stat().st_mtime_ns))
        assert all(map(torch.equal, batches(ImageDataset(**image_args())), batches(cached())))
    assert kept[0] == kept[1]
    assert len(caches(tmp_path)) == 2


def test_files_that_change_during_decoding_are_an_error(
    cached: Callable[..., ImageDataset],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to_disk = image_cache._to_disk

    def change(file: Any) -> None:
        to_disk(file)
        Image.fromarray(np.full((20, 16), 77, np.uint8)).save(root / "images" / "train_0.png")

    monkeypatch.setattr(image_cache, "_to_disk", change)
    with pytest.raises(DataError, match="changed while the image cache"):
        cached()
    assert caches(tmp_path) == []


def test_damaged_or_half_built_caches_are_not_used(
    cached: Callable[..., ImageDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(cached())
    [folder] = caches(tmp_path)
    pixels = folder / "pixels.u8"
    for damage in (
        lambda: pixels.write_bytes(pixels.read_bytes()[:-1]),
        lambda: (folder / "index.npz").write_bytes(b"nonsense"),
        lambda: (folder / "index.npz").write_bytes((folder / "index.npz").read_bytes()[:-90]),
        lambda: (folder / "index.npz").write_bytes(b""),
        lambda: (folder / "card.json").write_text("{"),
        lambda: (folder / "card.json").write_text("[]"),
        lambda: (folder / "card.json").write_text("[" * 100_000),
        lambda: (folder / "index.npz").unlink(),
    ):
        damage()
        assert all(map(torch.equal, expected, batches(cached())))

    left = folder.with_name(f".{folder.name}.partial-99999")
    left.mkdir()
    (left / "pixels.u8").write_bytes(b"1" * 5000)
    pixels.unlink()
    assert all(map(torch.equal, expected, batches(cached())))
    assert not left.exists()

    def stop(file: Any) -> None:
        raise KeyboardInterrupt

    pixels.unlink()
    monkeypatch.setattr(image_cache, "_to_disk", stop)
    with pytest.raises(KeyboardInterrupt):
        cached()
    assert caches(tmp_path) == []


def build(arguments: dict[str, Any], results: Any) -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    dataset = ImageDataset(**arguments)
    checksum = sum(int(image.sum()) for image in batches(dataset))
    results.put((os.getpid(), checksum, started))


def test_processes_that_start_together_build_one_cache(image_args: Args, tmp_path: Path) -> None:
    arguments = image_args(cache=str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=build, args=(arguments, results)) for _ in range(4)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=60)[1] for _ in processes}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    plain = image_args()
    assert sums == {sum(int(image.sum()) for image in batches(ImageDataset(**plain)))}
    [folder] = caches(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "index.npz", "pixels.u8"]


def test_a_killed_builder_releases_the_lock(
    cached: Callable[..., ImageDataset], image_args: Args, tmp_path: Path
) -> None:
    def die(file: Any) -> None:
        os._exit(1)

    def work() -> None:
        image_cache._to_disk = die
        ImageDataset(**image_args(cache=str(tmp_path / "cache")))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert len(list((tmp_path / "cache").glob(".*.partial-*"))) == 1
    plain = ImageDataset(**image_args())
    assert all(map(torch.equal, batches(plain), batches(cached())))
    assert not list((tmp_path / "cache").glob(".*.partial-*"))


def many(write: Write, root: Path, bad: int) -> None:
    names = ["train_0.png"] * 300
    for number in range(bad):
        (root / "images" / f"bad_{number}.png").write_bytes(b"nonsense")
        names[4 + number] = f"bad_{number}.png"
    write("train.image.tok", names)


def test_undecodable_images_are_skipped_as_without_a_cache(
    cached: Callable[..., ImageDataset], image_args: Args, write: Write, root: Path
) -> None:
    many(write, root, bad=3)
    changes = {"on_error": "skip"}
    one, other = cached(**changes), ImageDataset(**image_args(**changes))
    a, b = batches(one), batches(other)
    assert [len(x) for x in a] == [len(x) for x in b]
    assert all(map(torch.equal, a, b))
    assert one.skipped == other.skipped
    assert sorted(one.skipped) == [4, 5, 6]


def test_undecodable_images_are_all_named_at_construction(
    cached: Callable[..., ImageDataset], write: Write, root: Path
) -> None:
    many(write, root, bad=2)
    for _ in range(2):
        with pytest.raises(UndecodableImage, match=r"2 undecodable images: \S+tok:5: .*tok:6: "):
            cached()


def test_missing_images_are_skipped(
    cached: Callable[..., ImageDataset], image_args: Args, write: Write
) -> None:
    write("train.image.tok", ["train_0.png"] * 99 + ["gone.png"] + ["train_1.png"] * 100)
    one = cached(on_error="skip")
    other = ImageDataset(**image_args(on_error="skip"))
    assert len(one) == 199
    assert all(map(torch.equal, batches(one), batches(other)))


def test_an_unwritable_cache_folder_is_an_error(image_args: Args, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"image cache \S+ cannot be made: .*image\.cache"):
        ImageDataset(**image_args(cache=str(tmp_path / "file")))


def test_a_full_disk_is_an_error_and_leaves_nothing(
    cached: Callable[..., ImageDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache, "_to_disk", full)
    with pytest.raises(DataError, match=r"the disk is full.*image\.resize"):
        cached()
    assert caches(tmp_path) == []


def test_cached_data_set_can_be_sent_to_spawned_workers(
    cached: Callable[..., ImageDataset],
) -> None:
    dataset = cached()
    expected = batches(dataset)
    content = pickle.dumps(dataset)
    assert len(content) < 40_000
    assert all(map(torch.equal, expected, batches(pickle.loads(content))))


def test_building_is_logged(
    cached: Callable[..., ImageDataset], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        cached()
        cached()
    assert len([text for text in caplog.messages if "8 images" in text]) == 1


def test_images_with_damaged_data_are_refused(
    cached: Callable[..., ImageDataset], write: Write, root: Path
) -> None:
    """Also if the decoder does not notice it: a cache is read for many epochs."""
    path = root / "images" / "a.jpg"
    for number in range(24):
        pixels = render(draw_case(0, "train", number), 200).pixels
        colours = Image.fromarray(np.dstack([pixels, pixels.T, pixels]))
        colours.save(path, quality=95, subsampling=0)
        content, start = path.read_bytes(), 3000 + 37 * number
        path.write_bytes(content[:start] + bytes(150) + content[start + 150 :])
        try:
            decode_image(path)
        except UndecodableImage:
            continue
        break
    else:
        pytest.fail("the decoder notices everything")
    write("train.image.tok", ["train_0.png", "a.jpg"])
    with pytest.raises(
        UndecodableImage, match=r"tok:2: \S+a\.jpg cannot be decoded: its compressed"
    ):
        cached()
