from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vilmedic
from tests.export import exports
from tests.export.exports import save_run, simclr
from vilmedic.checkpoints.checkpoint import load_checkpoint
from vilmedic.checkpoints.exported import load_safetensors, read_export
from vilmedic.errors import CheckpointError


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    save_run(folder / "run", simclr(exports.cnn("squeezenet1_1"), 512))
    return vilmedic.load(folder / "run", device="cpu").export(folder / "out")


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


def header(path: Path) -> int:
    """Header size of a safetensors file in bytes, including the length field."""
    content = path.read_bytes()
    return 8 + int.from_bytes(content[:8], "little")


def test_damage_at_any_byte_of_a_header_is_refused(out: Path) -> None:
    heads = out / "heads.safetensors"
    good = heads.read_bytes()
    for place in range(header(heads)):
        for other in (good[place] ^ 1, good[place] ^ 0x20, 0x20):
            if other != good[place]:
                heads.write_bytes(good[:place] + bytes([other]) + good[place + 1 :])
                with pytest.raises(CheckpointError, match=r"heads\.safetensors: is damaged"):
                    load_checkpoint(out)
    heads.write_bytes(good)
    weights = out / "image_encoder/model.safetensors"
    good = weights.read_bytes()
    for place in [*range(0, header(weights), 297), len(good) - 1]:
        weights.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
            vilmedic.load(out)
    weights.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="Copy or download"):
        vilmedic.load(out)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"The folder is not complete"):
        vilmedic.load(out)


def test_the_format_is_detected_from_the_content(tmp_path: Path) -> None:
    weights = {"layer.weight": torch.arange(6.0).view(2, 3)}
    save_file(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        loaded = load_checkpoint(tmp_path / name)["model"]
        assert torch.equal(loaded["layer.weight"], weights["layer.weight"])


def test_weight_only_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    save_file(weights, path, metadata={"format": "pt"})
    good, size = path.read_bytes(), header(path)
    found = load_checkpoint(path)["model"]
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    refused = 0
    for place in range(size):
        for other in (0x00, 0x22, 0x30, 0xFF, good[place] ^ 1):
            path.write_bytes(good[:place] + bytes([other]) + good[place + 1 :])
            try:
                load_safetensors(path)
            except CheckpointError:
                refused += 1
    assert refused > 2 * size
    for content in (b"", b"\x00" * 8, b"\xff" * 8, good[: size - 1], good[:-1]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file of weights"):
        load_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_safetensors(tmp_path)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "is of format 2": lambda m: m.update(format=2),
    "is of format None": lambda m: m.pop("format"),
    "it lists no files": lambda m: m.update(files=[]),
    "has no digest": lambda m: m["files"].update({"heads.safetensors": {"size": 3}}),
    "is none of an export": lambda m: m["files"].update({"code.py": m["files"].popitem()[1]}),
    "it would be written outside": lambda m: m["files"].update(
        {"../x.json": m["files"].popitem()[1]}
    ),
    "there is no 'weights'": lambda m: m.pop("weights"),
    "there is no 'file'": lambda m: m.update(weights=[{}]),
    "it lists no file '/etc/passwd'": lambda m: m["weights"][0].update(file="/etc/passwd"),
    r"it lists no file '\.\./run": lambda m: m["data"].update(
        tokenizer={"file": "../run/x.json", "special": {}}
    ),
    "step is no number": lambda m: m.update(step="x"),
    "its 'config' is a list": lambda m: m.update(config=[]),
    "its 'networks' hold other than": lambda m: m.update(networks={"a": 1}),
    "it names no weights": lambda m: m.update(weights=[]),
    "weights that the file lacks": lambda m: m["weights"].pop(),
}


@pytest.mark.parametrize("message", CHANGES)
def test_invalid_manifest_entries_are_refused(out: Path, message: str) -> None:
    path = out / "vilmedic.json"
    manifest = json.loads(path.read_text())
    CHANGES[message](manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        vilmedic.load(out)


def test_a_file_that_is_not_a_manifest_is_refused(out: Path) -> None:
    path = out / "vilmedic.json"
    for content in (b"", b"[]", b"\xff\xfe", b"{", b"[" * 100_000, b"nan"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"vilmedic\.json: is damaged"):
            vilmedic.load(out)


def test_an_export_is_a_checkpoint(exported: Path) -> None:
    state = read_export(exported)
    run = load_checkpoint(exported.parent / "run" / exports.BEST)
    assert state["config"] == {key: run["config"][key] for key in ("name", "model", "dataset")}
    assert state["data"] == run["data"]
    assert state["progress"] == {"step": 40}
    assert state["score"] == 0.5
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        vilmedic.load(exported, ema=True)
    with pytest.raises(CheckpointError, match=r"is an export, so ckpt='last' has no meaning"):
        vilmedic.load(exported, ckpt="last")
