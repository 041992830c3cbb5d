"""Untrusted exported folders are loaded unchanged or refused.

Nothing in them is executed, and no damage changes a weight silently.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vilmedic
from tests.export.exports import convirt, save_run
from tests.hostile.table import Table

DAMAGED, CHANGED = 30, 60
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, "x", "", "\x1b[2J", "../../x", "/etc/passwd", "a\0b"),
    *([], {}, [[]], {"a": {}}, [None], "${oc.env:HOME}", "user/name", ["x"] * 50),
)
IMAGE = np.random.default_rng(0).integers(0, 255, (44, 50), dtype=np.uint8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ConVIRT, with its export in `out`."""
    folder = tmp_path_factory.mktemp("hostile")
    save_run(folder / "run", convirt("squeezenet1_1", 512))
    vilmedic.load(folder / "run", device="cpu").export(folder / "out")
    return folder


@pytest.fixture
def out(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base / "out", tmp_path / "out"))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all nested values."""
    if path:
        yield path
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield from places(inner, (*path, key))


def use(folder: Path) -> None:
    """Load an export and call its methods."""
    model = vilmedic.load(folder, device="cpu")
    model.embed_images([IMAGE], workers=1)
    if "embed_texts" in model.abilities:
        model.embed_texts(["small effusion"])


def test_changed_manifests_load_or_are_refused(base: Path, out: Path, table: Table) -> None:
    whole = json.loads((out / "vilmedic.json").read_text())
    draw = random.Random(5)
    every = [one for one in places(whole) if one[0] != "about"]
    for number in range(CHANGED):
        manifest = copy.deepcopy(whole)
        *parents, last = place = draw.choice(every)
        node: Any = manifest
        for key in parents:
            node = node[key]
        if draw.random() < 0.2:
            del node[last]
            what = "removed"
        else:
            node[last] = what = draw.choice(ODD)
        (out / "vilmedic.json").write_text(json.dumps(manifest))
        table.attempt(
            "exports, changed",
            f"{number}: {place} {what!r}",
            lambda: use(out),
            seconds=10,
            outside=[base],
            marker=out.parent / "executed",
        )
    table.check()


def test_damaged_files_load_or_are_refused(base: Path, out: Path, table: Table) -> None:
    draw = random.Random(6)
    files = sorted(path for path in out.rglob("*.*") if path.name != "README.md")
    for number in range(DAMAGED):
        path = draw.choice(files)
        good = path.read_bytes()
        content = bytearray(good)
        for _ in range(draw.choice((1, 1, 4))):
            content[draw.randrange(min(len(content), 4096))] = draw.randrange(256)
        if draw.random() < 0.3:
            content = content[: draw.randrange(len(content))]
        path.write_bytes(content)
        name = f"{number}: {path.relative_to(out)}"
        message = table.attempt(
            "exports, damaged", name, lambda: use(out), seconds=10, outside=[base]
        )
        if message is None and bytes(content) != good:
            assert path.name == "vilmedic.json", name  # this file itself has no digest
            found = vilmedic.load(out, device="cpu").model.state_dict()
            expected = vilmedic.load(base / "run", device="cpu").model.state_dict()
            assert all(torch.equal(found[key], value) for key, value in expected.items()), name
        path.write_bytes(good)
    table.check()
