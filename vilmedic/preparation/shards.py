"""Writing of a training folder's images to tar shards.

The shards follow the layout of WebDataset: the files of a sample share the name before the first
dot, its line number. They hold the images as they are on disk (`000000012.jpg`, or
`000000012.0.jpg`, `000000012.1.jpg` where a line names several), the report (`.txt`) and all lines
(`.json`), so that other programs can stream them. Images whose names have no suffix of a format
(numbers, UIDs) get one by their content.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilmedic.datasets.decode import HEAD, MAX_PIXELS, SUFFIXES, open_image, suffix_by_content
from vilmedic.datasets.image_source import SHARD_INDEX, ImageFiles, first_numbers
from vilmedic.datasets.lines import check_aligned, listed, read_lines
from vilmedic.datasets.shards import Shard, ShardIndex
from vilmedic.errors import DataError
from vilmedic.files import core_count, replacing, sha256_of
from vilmedic.log import progress

CARD = "shards.json"
ALL = 10**6  # images of a line that are taken


@dataclass(frozen=True)
class Member:
    """One file to be written into a shard.

    Attributes:
        name: its name there.
        content: a file to copy, or the bytes themselves.
        image: whether it is an image of its line.
    """

    name: str
    content: Path | bytes
    image: bool


def write_shards(
    root: Path,
    target: Path,
    *,
    image_path: Path | None = None,
    ext: str | None = None,
    samples: int = 1000,
    force: bool = False,
    workers: int = 0,
) -> dict[str, Any]:
    """Write the shards of all splits of a folder of line files, and the line files beside them.

    Shards that are there already, as after an interruption, are kept when they hold these very
    files, which are compared with them. The index of a split comes last.

    Args:
        root: folder with `<split>.image.tok` and other line files.
        target: folder to write.
        image_path: folder that the paths start from; None as in `ImageDataset`.
        ext: file extension of paths that are written without one.
        samples: lines per shard.
        force: replace what `target` holds.
        workers: shards that are written at a time, 0 for one per core.

    Returns:
        For each split the number of lines, images, shards and bytes.

    Raises:
        DataError: an image is missing, the line files do not belong together, or `target` holds
            other shards.
    """
    splits = sorted(path.name.removesuffix(".image.tok") for path in root.glob("*.image.tok"))
    if not splits:
        raise DataError(f"{root} holds no line files of images, such as train.image.tok.")
    if target.resolve() == root.resolve():
        raise DataError(f"Shards go to another folder than the line files in {root}.")
    images = root / "images"
    folder = image_path or (images if images.is_dir() else root)
    suffix = f".{ext.lstrip('.')}" if ext else ""
    plan = {
        "source": str(root.resolve()),
        "image_path": str(folder.resolve()),
        "ext": suffix,
        "samples": samples,
    }
    _claim(target, plan, force)
    return {
        split: _write_split(root, target, split, folder, suffix, samples, workers)
        for split in splits
    }


def _claim(target: Path, plan: dict[str, Any], force: bool) -> None:
    """Record the contents of the folder, so that a later run can resume or refuse."""
    card = target / CARD
    if force and card.is_file():
        shutil.rmtree(target)
    if target.is_dir() and any(target.iterdir()):
        if not card.is_file():
            raise DataError(f"{target} is not empty and holds no shards. Give another folder.")
        found = json.loads(card.read_text(encoding="utf-8"))
        if found != plan and any(target.glob("*.tar")):
            raise DataError(
                f"{target} holds shards made with {found}, not with {plan}. Replace them with "
                "--force or give another folder."
            )
    target.mkdir(parents=True, exist_ok=True)
    card.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")


def _write_split(
    root: Path, target: Path, split: str, folder: Path, ext: str, samples: int, workers: int
) -> dict[str, int]:
    kinds = sorted(path.name.removeprefix(f"{split}.") for path in root.glob(f"{split}.*.tok"))
    lines = {kind.removesuffix(".tok"): read_lines(root, split, kind) for kind in kinds}
    check_aligned(list(lines.values()))
    files = ImageFiles(lines["image"], folder, ext, "grey", None, ALL, MAX_PIXELS)
    missing = files.missing()
    if missing:
        raise DataError(f"{listed(list(missing.values()), 'missing image')}. {files.remedy}.")
    for kind in kinds:
        shutil.copyfile(root / f"{split}.{kind}", target / f"{split}.{kind}")

    def members(line: int) -> list[Member]:
        key, paths = f"{line:09d}", files.paths(line)
        several = len(paths) > 1
        found = [
            Member(f"{key}.{n}{suffix}" if several else f"{key}{suffix}", path, True)
            for n, (path, suffix) in enumerate(zip(paths, map(_suffix, paths), strict=True))
        ]
        texts = {kind: texts[line] for kind, texts in lines.items()}
        if "report" in texts:
            found.append(Member(f"{key}.txt", texts["report"].encode(), False))
        record = json.dumps(texts, ensure_ascii=False)
        return [*found, Member(f"{key}.json", record.encode(), False)]

    count = len(lines["image"])
    starts = range(0, count, samples)
    chunks = [range(start, min(start + samples, count)) for start in starts]

    def write(number: int) -> tuple[Shard, list[tuple[int, int]]]:
        path = target / f"{split}-{number:06d}.tar"
        every = [member for line in chunks[number] for member in members(line)]
        return _shard(path, every)

    with ThreadPoolExecutor(workers or min(8, core_count())) as pool:
        shards = pool.map(write, range(len(chunks)))
        written = list(progress(shards, f"Split {split}", "shards", len(chunks)))
    index = _index(written, [len(files.names(line)) for line in range(count)])
    index.save(target / f"{split}.{SHARD_INDEX}")
    size = sum(shard.size for shard in index.shards)
    return {"lines": count, "images": len(index.size), "shards": len(chunks), "bytes": size}


def _suffix(path: Path) -> str:
    """The suffix of an image, by its content where its name has none that says a format."""
    if path.suffix.lower() in SUFFIXES:
        return path.suffix
    with open_image(path) as file:
        suffix = suffix_by_content(file.read(HEAD))
    if suffix is None:
        raise DataError(f"{path} has neither the name nor the content of an image.")
    return suffix


def _shard(path: Path, members: Sequence[Member]) -> tuple[Shard, list[tuple[int, int]]]:
    """Write a shard unless it is there, and find its images: first byte and size of each."""
    found = list(_members(path)) if path.is_file() else []
    if not _holds(path, found, members):
        with (
            replacing(path) as draft,
            tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for member in members:
                _add(tar, member)
        found = list(_members(path))
    images = [
        (offset, size)
        for member, (_, offset, size) in zip(members, found, strict=True)
        if member.image
    ]
    return Shard(path.name, path.stat().st_size, sha256_of(path)), images


def _holds(path: Path, found: Sequence[tuple[str, int, int]], members: Sequence[Member]) -> bool:
    """Return whether a shard, in which some files were found, holds just these members."""
    if [(name, size) for name, _, size in found] != [(m.name, _size(m)) for m in members]:
        return False
    with open(path, "rb") as shard:
        for (_, offset, size), member in zip(found, members, strict=True):
            shard.seek(offset)
            if shard.read(size) != _content(member):
                return False
    return True


def _content(member: Member) -> bytes:
    content = member.content
    return content if isinstance(content, bytes) else content.read_bytes()


def _add(tar: tarfile.TarFile, member: Member) -> None:
    """Add a file without owner and time, so that the same files give the same shard."""
    info = tarfile.TarInfo(member.name)
    info.size = _size(member)
    if isinstance(member.content, bytes):
        tar.addfile(info, io.BytesIO(member.content))
        return
    with open(member.content, "rb") as file:
        tar.addfile(info, file)


def _size(member: Member) -> int:
    if isinstance(member.content, bytes):
        return len(member.content)
    return member.content.stat().st_size


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each file in a tar; nothing for one that is damaged."""
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                yield info.name, info.offset_data, info.size
    except tarfile.TarError:
        return


def _index(
    written: Sequence[tuple[Shard, list[tuple[int, int]]]], counts: Sequence[int]
) -> ShardIndex:
    places = [place for _, images in written for place in images]
    numbers = [number for number, (_, images) in enumerate(written) for _ in images]
    return ShardIndex(
        shards=[shard for shard, _ in written],
        starts=np.array(first_numbers(counts), dtype=np.int64),
        shard=np.array(numbers, dtype=np.int32),
        offset=np.array([offset for offset, _ in places], dtype=np.int64),
        size=np.array([size for _, size in places], dtype=np.int64),
    )
