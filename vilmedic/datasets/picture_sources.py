"""Which pictures a folder of line files has: files of their own, or members of shards."""

from __future__ import annotations

from pathlib import Path

from vilmedic.datasets.decode import Color
from vilmedic.datasets.lines import Lines
from vilmedic.datasets.pictures import PictureFiles, Pictures
from vilmedic.datasets.shard_store import ShardStore
from vilmedic.datasets.shards import INDEX, PictureShards, ShardIndex

GIB = 2**30


def open_pictures(
    texts: Lines,
    *,
    root: str,
    split: str,
    image_path: str | None,
    ext: str | None,
    color: Color,
    resize: int | None,
    most: int,
    spool: str | None,
    spool_gib: float,
    max_pixels: int,
) -> Pictures:
    """The pictures of a split; see `ImageDataset` for the arguments.

    Raises:
        DataError: shards are not there, or do not belong to the lines.
    """
    index = Path(root) / f"{split}.{INDEX}"
    if index.is_file():
        folder = Path(spool) if spool is not None else Path(root) / "spool"
        store = ShardStore(image_path or root, folder, int(spool_gib * GIB))
        shards = ShardIndex.load(index)
        return PictureShards(texts, shards, store, color, resize, most, max_pixels)
    images = Path(root) / "images"
    default = images if images.is_dir() else Path(root)
    folder = Path(image_path) if image_path is not None else default
    suffix = f".{ext.lstrip('.')}" if ext else ""
    return PictureFiles(texts, folder, suffix, color, resize, most, max_pixels)
