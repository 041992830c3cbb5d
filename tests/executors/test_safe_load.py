from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from vilmedic.errors import CheckpointError
from vilmedic.executors.safe_load import load_plain


class Harmful:
    """Runs a program where it is unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def saved(path: Path, contents: Any) -> Path:
    torch.save(contents, path)
    return path


def test_a_pickled_configuration_arrives_as_plain_values(tmp_path: Path) -> None:
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
    assert contents["config"]["splits"] == [
        "validate",
        "${model.name}",
    ]  # one is lost: none is told
    assert type(contents["config"]["model"]) is dict


def test_numpy_numbers_arrive_as_those_of_python(tmp_path: Path) -> None:
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
def test_anything_else_is_refused_with_file_and_type(
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


def test_a_file_learns_nothing_of_this_machine(
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
def test_a_file_cut_short_is_named(kept: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "short.pth", {"model": {"w": torch.rand(500)}})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"short\.pth: not a readable checkpoint; it was cut"):
        load_plain(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such checkpoint"):
        load_plain(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_plain(tmp_path)
