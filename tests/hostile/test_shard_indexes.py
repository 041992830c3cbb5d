"""Untrusted shard indexes are read correctly or refused; nothing is written elsewhere."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hostile.table import Table
from vilmedic.datasets.aligned import SampleKey
from vilmedic.datasets.image import ImageDataset
from vilmedic.preparation.shards import write_shards

INDEXES = 30
NUMBERS = (-1, -(2**63), 2**62, 2**63 - 1, 10**9, 0, 1)
NAMES = ("x/../../../evil", "/tmp/evil", "..", "", "a/b", "\x1b[2J", "n" * 300, "CON:evil")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images in shards of two."""
    base = tmp_path_factory.mktemp("hostile")
    (base / "lines" / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(base / "lines" / "images" / f"{number}.png")
    lines = "".join(f"{number}.png\n" for number in range(6))
    (base / "lines" / "train.image.tok").write_text(lines)
    write_shards(base / "lines", base / "shards", samples=2)
    return base / "shards"


def mutated(arrays: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The arrays of an index, one of them changed."""
    changed = {name: np.array(value) for name, value in arrays.items()}
    name = draw.choice(sorted(changed))
    value = changed[name]
    kind = draw.randrange(5)
    if kind == 0:
        changed.pop(name)
    elif kind == 1:
        changed[name] = value[: draw.randrange(len(value))]
    elif kind == 2:
        changed[name] = value[None]
    elif value.dtype.kind == "U":
        row = draw.randrange(len(value))
        texts = value.tolist()
        texts[row] = draw.choice(NAMES)
        changed[name] = np.array(texts)
    else:
        value = value.astype(np.int64)
        value[draw.randrange(len(value))] = draw.choice(NUMBERS)
        changed[name] = value
    return changed


def read(root: Path) -> list[torch.Tensor]:
    data = ImageDataset(split="train", training=False, seed=0, root=str(root), resize=16, crop=16)
    return [data[SampleKey(line)]["images"][0] for line in range(len(data))]


@pytest.mark.parametrize("number", range(INDEXES))
def test_an_index_is_read_or_refused(
    shards: Path, tmp_path: Path, number: int, table: Table
) -> None:
    draw = random.Random(number)
    root = tmp_path / "in" / "root"
    root.mkdir(parents=True)
    for path in shards.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    index = root / "train.shards.npz"
    damaged = number % 3 == 2
    if damaged:
        content = bytearray(index.read_bytes())
        for _ in range(draw.choice((1, 3, 30))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        index.write_bytes(content)
    else:
        with np.load(index) as saved:
            arrays = {name: saved[name] for name in saved.files}
        np.savez(index, **mutated(arrays, draw))
    images: list[torch.Tensor] = []
    message = table.attempt(
        "shard indexes",
        f"number {number}",
        lambda: images.extend(read(root)),
        outside=[tmp_path],
        seconds=5,
    )
    if message is None:
        # A changed index may assign another image to a line; a damaged one may not.
        assert not damaged or all(map(torch.equal, images, read(shards)))
    else:
        assert str(root) in message  # every refusal names the file
