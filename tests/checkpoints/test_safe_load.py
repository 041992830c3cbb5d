from __future__ import annotations

import argparse
import functools
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from vilmedic.checkpoints.safe_load import load_plain
from vilmedic.errors import CheckpointError


class Harmful:
    """Runs a program when it is unpickled unsafely."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def saved(path: Path, contents: Any) -> Path:
    torch.save(contents, path)
    return path


def test_pickled_configurations_become_plain_values(tmp_path: Path) -> None:
    config = OmegaConf.create(
        {
            "model": {"size": 32, "rate": 0.5, "name": "x", "flag": True, "none": None},
            "splits": ["validate", "${model.name}"],
            "lost": "${nowhere.at.all}",
        }
    )
    path = saved(
        tmp_path / "a.pth", {"config": config, "part": config.model, "list": config.splits}
    )
    contents = load_plain(path)
    assert contents["part"] == {"size": 32, "rate": 0.5, "name": "x", "flag": True, "none": None}
    assert contents["list"] == ["validate", "x"]
    assert contents["config"]["splits"] == ["validate", "x"]
    assert contents["config"]["lost"] == "${nowhere.at.all}"
    assert type(contents["config"]["model"]) is dict


def test_numpy_numbers_become_python_numbers(tmp_path: Path) -> None:
    numbers = {
        "f8": np.float64(0.25),
        "f4": np.float32(0.5),
        "i8": np.int64(3),
        "b": np.bool_(True),
    }
    contents = load_plain(saved(tmp_path / "a.pth", {**numbers, "pair": (np.float64(1), [2])}))
    assert contents == {"f8": 0.25, "f4": 0.5, "i8": 3, "b": True, "pair": (1.0, [2])}
    assert {type(contents[name]) for name in numbers} == {float, int, bool}


def test_tensors_keep_their_type_and_order(tmp_path: Path) -> None:
    weights = torch.nn.Linear(2, 3).state_dict()
    weights["half"] = torch.ones(2, dtype=torch.bfloat16)
    contents = load_plain(saved(tmp_path / "a.pth", weights))
    assert list(contents) == ["weight", "bias", "half"]
    assert all(torch.equal(contents[name], weights[name]) for name in weights)
    assert contents["half"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (functools.partial(int), "functools.partial"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Path("x"), "pathlib"),
        (np.uint8(3), "numpy.dtypes.UInt8DType"),
        (np.float16(3), "numpy.dtypes.Float16DType"),
        (np.str_("x"), "numpy.dtypes.StrDType"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_are_refused_with_file_and_type(
    value: Any, named: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "other.pth", {"model": {}, "extra": [value]})
    with pytest.raises(CheckpointError, match=rf"other\.pth: holds a '{named}"):
        load_plain(path)


def test_a_program_in_a_file_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    path = saved(tmp_path / "bad.pth", {"config": Harmful(f"touch '{mark}'")})
    with pytest.raises(CheckpointError, match=r"bad\.pth: holds a '\w+\.system'"):
        load_plain(path)
    assert not mark.exists()


def test_a_file_cannot_read_environment_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "open sesame")
    config = OmegaConf.create(
        {"a": "${oc.env:SECRET}", "b": "${.a}", "c": "${${.d}:SECRET}", "d": "oc.env"}
    )
    contents = load_plain(saved(tmp_path / "a.pth", {"config": config}))
    assert contents["config"] == {
        "a": "${oc.env:SECRET}",
        "b": "${.a}",
        "c": "${${.d}:SECRET}",
        "d": "oc.env",
    }


@pytest.mark.parametrize("kept", [0, 10, 300, -40])
def test_a_truncated_file_is_an_error(kept: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "short.pth", {"model": {"w": torch.rand(500)}})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"short\.pth: not a readable checkpoint; it was cut"):
        load_plain(path)


def test_missing_files_and_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such checkpoint"):
        load_plain(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_plain(tmp_path)


def rewritten(path: Path, pickled: bytes | None = None, **records: bytes) -> Path:
    """Replace records of a checkpoint, with correct checksums."""
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    folder = next(iter(held)).partition("/")[0]
    if pickled is not None:
        held[f"{folder}/data.pkl"] = pickled
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            archive.writestr(name, records.get(name.partition("/")[2], content))
    return path


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def test_a_flipped_bit_changes_nothing_or_is_refused(tmp_path: Path) -> None:
    """Flip every bit of a small file: it loads with equal values or raises an error."""
    contents = {"model": {"w": torch.arange(4.0), "n": torch.ones(1)}, "epoch": 3, "name": "x"}
    path = saved(tmp_path / "bit.pth", contents)
    whole = path.read_bytes()
    loaded = refused = 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 1500):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            given = load_plain(path)
        except CheckpointError as error:
            assert f"{path}: " in str(error)  # noqa: PT017  (one loop over both outcomes)
            refused += 1
        else:
            assert equal(given, contents), f"bit {bit}"
            loaded += 1
    assert loaded + refused == 1500
    assert refused > 100


def test_a_flipped_bit_in_a_weight_names_its_record(tmp_path: Path) -> None:
    path = saved(tmp_path / "bit.pth", {"model": {"w": torch.full((100,), 0.5)}})
    whole = path.read_bytes()
    place = whole.index(torch.full((3,), 0.5).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    torch.load(path, weights_only=True)  # torch itself does not notice
    with pytest.raises(
        CheckpointError, match=r"bit\.pth: is damaged: the checksum of 'bit/data/0'"
    ):
        load_plain(path)


def test_a_file_saved_without_checksums_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "a.pth", {"w": torch.ones(2)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_plain(path)["w"], torch.ones(2))
    assert "without checksums" in caplog.text


def test_legacy_torch_files_are_read(tmp_path: Path) -> None:
    contents = {"model": {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)[1:]}, "epoch": 3}
    torch.save(contents, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert equal(load_plain(tmp_path / "a.pth"), contents)


class Forged:
    """Pickles as an instance of an OmegaConf class with any attributes."""

    def __init__(self, cls: type, **state: Any) -> None:
        self.cls, self.state = cls, state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.cls, (), self.state


@pytest.mark.parametrize("place", ["parent", "value", "metadata", "content"])
def test_pickled_configurations_never_call_resolvers(tmp_path: Path, place: str) -> None:
    """With a parent, value or metadata that OmegaConf would resolve while reading."""
    called: list[str] = []

    def told(name: str) -> str:
        called.append(name)
        return "secret"

    OmegaConf.register_resolver("told", told)
    try:
        evil = OmegaConf.create({"key_type": "${told:x}", "element_type": "${told:y}"})
        top = OmegaConf.create({"a": "${told:z}", "b": "x"})
        plain = vars(OmegaConf.create({"b": 1}))
        state = {name: plain[name] for name in ("_metadata", "_parent", "_content")}
        match place:
            case "parent":
                node = vars(OmegaConf.create({"c": "${a}"}))["_content"]["c"]
                vars(node)["_parent"] = top
                state |= {"_parent": top, "_content": {"c": node}}
            case "value":
                state["_content"] = {"c": vars(OmegaConf.create(["${told:q}"]))["_content"][0]}
            case "metadata":
                state["_metadata"] = evil
            case "content":
                state["_content"] = "${told:w}"
        path = saved(tmp_path / "a.pth", {"config": Forged(DictConfig, **state)})
        contents = load_plain(path)
    finally:
        OmegaConf.clear_resolver("told")
    assert called == []
    assert "secret" not in str(contents)


def test_key_interpolations_are_resolved_without_omegaconf(tmp_path: Path) -> None:
    config = OmegaConf.create(
        {
            "size": 32,
            "model": {"side": "${size}", "name": "vae-${size}-${.side}", "up": "${..size}"},
            "list": ["${model.name}", "${list.0}", "${list[0]}", "${.0}"],
            "whole": "${model}",
            "text": "x ${model}",
            "round": "${around}",
            "around": "${round}",
            "far": "${list.9}",
            "called": "${oc.env:HOME}",
            "of_called": "${called}",
        }
    )
    given = load_plain(saved(tmp_path / "a.pth", {"config": config}))["config"]
    model = {"side": 32, "name": "vae-32-32", "up": 32}
    assert given["model"] == given["whole"] == model
    assert given["list"] == ["vae-32-32"] * 4
    kept = ("text", "round", "around", "far", "called", "of_called")
    assert {name: given[name] for name in kept} == {
        name: OmegaConf.to_container(config)[name] for name in kept
    }


def deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_recursive_and_deep_lists_are_refused(tmp_path: Path) -> None:
    shared: list[Any] = ["x"]
    for _ in range(40):
        shared = [shared, shared]
    itself: list[Any] = []
    itself.append(itself)
    given = {"shared": shared, "itself": itself}
    for name, value in given.items():
        path = saved(tmp_path / f"{name}.pth", {"model": {}, "more": value})
        with pytest.raises(CheckpointError, match=rf"{name}\.pth: holds (more|values nested)"):
            load_plain(path)
    pickled = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    path = rewritten(saved(tmp_path / "deep.pth", {}), pickled)
    with pytest.raises(CheckpointError, match=r"deep\.pth: holds values nested deeper"):
        load_plain(path)
    assert load_plain(saved(tmp_path / "some.pth", deep(50))) == deep(50)


def test_shared_values_are_copied(tmp_path: Path) -> None:
    value = [1, [2]]
    given = load_plain(saved(tmp_path / "a.pth", {"a": value, "b": value}))
    assert given == {"a": value, "b": value}
    assert given["a"] is not given["b"]


def test_decompression_bombs_are_not_unpacked(tmp_path: Path) -> None:
    path = saved(tmp_path / "zeros.pth", {"w": torch.zeros(100)})
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in held.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"zeros\.pth: is compressed"):
        load_plain(path)


def test_tensors_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"w": torch.zeros(3).expand(10**9, 3)})
    with pytest.raises(CheckpointError, match=r"w\.pth: claims a tensor of 3,000,000,000 values"):
        load_plain(path)
    path = saved(tmp_path / "m.pth", {"w": torch.zeros(3, device="meta")})
    with pytest.raises(CheckpointError, match=r"m\.pth: holds a '.*meta_tensor"):
        load_plain(path)


def test_a_file_larger_than_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "w.pth", {"w": torch.zeros(3)})
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(CheckpointError, match="is larger than the memory of this machine"):
        load_plain(path)
