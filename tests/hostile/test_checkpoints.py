"""Untrusted checkpoints and damaged run directories are resumed unchanged or refused.

Nothing in them is executed, nothing is written outside the run directory, and no damage changes a
weight silently.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.crash.killing import ROOT
from tests.crash.systems import VAE
from tests.full_disk import odd_file
from tests.hostile.table import Table
from vilmedic import cli, run
from vilmedic.log import LOGGER
from vilmedic.phantom.write import Plan, build

DAMAGED, CHANGED = 22, 22
SECONDS = 30.0  # time limit; each takes about one

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, float("nan"), "x", "", "\x1b[2J", b"b", 1j),
    *([], {}, (), [[]], {"a": {}}, {0: 1}, set(), "${oc.env:HOME}"),
    *(torch.zeros(0), torch.zeros(3, 3), torch.ones(1, dtype=torch.int64), torch.tensor(True)),
    *(torch.full((2,), float("nan")), torch.zeros(1).expand(50), torch.zeros(2, dtype=torch.half)),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and in `whole` a run of one epoch that saved after each of its two steps."""
    folder = tmp_path_factory.mktemp("hostile")
    build(folder / "data", Plan(train=9, validate=5, test=2, size=32), force=False, workers=1)
    status, text = train(folder, folder / "whole", "ckpt=auto", "trainor.epochs=1")
    assert status == 0, text
    return folder


@pytest.fixture(scope="module")
def continued(base: Path) -> dict[str, Any]:
    """The weights of the run after one more epoch."""
    shutil.copytree(base / "whole", base / "continued")
    status, text = train(base, base / "continued", "ckpt=last_3.pth")
    assert status == 0, text
    return torch.load(base / "continued/run/last_3.pth", weights_only=True)["model"]


def attempt(table: Table, kind: str, base: Path, ckpt_dir: Path, ckpt: str) -> tuple[int, str]:
    """Resume a run as a counted input; return status and output."""
    ended: list[tuple[int, str]] = []

    def act() -> str | None:
        ended.append(train(base, ckpt_dir, f"ckpt={ckpt}"))
        status, text = ended[0]
        assert status in (0, cli.FAILED)
        return text if status else None

    beside = [base / "data", base / "whole"]
    marker = ckpt_dir.parent / "executed"
    table.attempt(kind, str(ckpt_dir), act, seconds=SECONDS, outside=beside, marker=marker)
    table.check()
    return ended[0]


def train(base: Path, ckpt_dir: Path, *more: str) -> tuple[int, str]:
    """Train in this process, so that unexpected errors are raised; return status and output."""
    words = [*VAE.arguments(base / "data"), "trainor.num_workers=0", "trainor.epochs=2"]
    words += [
        "trainor.lr_decay=null",
        "trainor.loggers=[]",
        "name=run",
        f"ckpt_dir={ckpt_dir}",
        *more,
    ]
    told = io.StringIO()
    before = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    LOGGER.handlers.clear()
    folder = Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), pages_apart():
            status = cli.train(words)
    finally:
        os.chdir(folder)
        LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = before
    return status, told.getvalue()


@contextlib.contextmanager
def pages_apart() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_pages", lambda run_dir: None)
        yield


@pytest.fixture
def ckpt_dir(base: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run; nothing may be written outside it."""
    shutil.copytree(base / "whole", tmp_path / "ckpt")
    before = {path for path in base.rglob("*") if "continued" not in path.parts}
    yield tmp_path / "ckpt"
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["run"]
    assert {path for path in base.rglob("*") if "continued" not in path.parts} == before


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file damaged as by a disk, a copy or a network."""
    changed = bytearray(content)
    place, length = draw.randrange(len(content)), draw.randrange(1, 600)
    match draw.randrange(8):
        case 0 | 1 | 2:
            for _ in range(draw.choice((1, 1, 2, 20))):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        case 3:
            del changed[place:]
        case 4:
            changed[place : place + length] = bytes(length)
        case 5:
            changed[place:place] = draw.randbytes(length)
        case 6:
            del changed[place : place + length]
        case 7:
            changed += draw.randbytes(length)
    return bytes(changed)


@pytest.mark.parametrize("number", range(DAMAGED))
def test_damage_has_no_effect_or_is_an_error(
    base: Path, ckpt_dir: Path, continued: dict[str, Any], number: int, table: Table
) -> None:
    path = ckpt_dir / "run/last_3.pth"
    path.write_bytes(damaged(path.read_bytes(), random.Random(number)))
    status, text = attempt(table, "checkpoints, damaged", base, ckpt_dir, "last_3.pth")
    if status == 0:
        given = torch.load(path, weights_only=True)["model"]
        assert all(torch.equal(given[name], value) for name, value in continued.items())
    else:
        assert f"error: {path}: " in text
        assert "The state before it: ckpt=previous_3.pth" in text


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value))
    inner = [value[key] for key in keys if isinstance(value[key], dict | list)]
    return [*((value, key) for key in keys), *(one for part in inner for one in places(part))]


def altered(state: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A state with one value of another type or size, or with one missing."""
    changed = copy.deepcopy(state)
    # The stored configuration has most of the values; it is drawn like any other part.
    part = draw.choice(sorted(changed))
    owner, key = draw.choice([(changed, part), *places({part: changed[part]})])
    if owner is changed and draw.random() < 0.3:
        del changed[part]
    elif draw.random() < 0.15 and isinstance(owner, dict):
        owner[draw.choice(("new", 7, ("a", "b")))] = draw.choice(ODD)
    elif owner is not changed and key == part:
        changed[part] = draw.choice(ODD)
    else:
        owner[key] = draw.choice(ODD)
    return changed


@pytest.mark.parametrize("number", range(CHANGED))
def test_a_changed_state_is_resumed_or_refused(
    base: Path, ckpt_dir: Path, number: int, table: Table
) -> None:
    """The checksums are correct: the file was changed on purpose."""
    path = ckpt_dir / "run/last_3.pth"
    state = torch.load(path, weights_only=True)
    torch.save(altered(state, random.Random(number)), path)
    status, text = attempt(table, "checkpoints, changed", base, ckpt_dir, "last_3.pth")
    assert status == 0 or "error: " in text


class Harmful:
    """Runs a program when it is unpickled unsafely."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def runs_a_program(path: Path, state: dict[str, Any]) -> None:
    torch.save({**state, "config": Harmful(f"touch '{path.parents[2]}/executed'")}, path)


def shares_lists(path: Path, state: dict[str, Any]) -> None:
    value: list[Any] = [0]
    for _ in range(40):
        value = [value, value]
    torch.save({**state, "metric": value}, path)


def holds_itself(path: Path, state: dict[str, Any]) -> None:
    state["config"]["trainor"]["again"] = state
    torch.save(state, path)


def is_compressed(path: Path, state: dict[str, Any]) -> None:
    state["model"]["zeros"] = torch.zeros(2_000_000)
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in held.items():
            archive.writestr(name, content)


def claims_more(path: Path, state: dict[str, Any]) -> None:
    torch.save({**state, "model": {"w": torch.zeros(1).expand(10**12)}}, path)


def is_deep(path: Path, state: dict[str, Any]) -> None:
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
            archive.writestr(name, deep if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    "make", [runs_a_program, shares_lists, holds_itself, is_compressed, claims_more, is_deep]
)
def test_malicious_states_are_refused(
    base: Path, ckpt_dir: Path, make: Callable[[Path, dict[str, Any]], None], table: Table
) -> None:
    path = ckpt_dir / "run/last_3.pth"
    make(path, torch.load(path, weights_only=True))
    status, text = attempt(table, "checkpoints, made to harm", base, ckpt_dir, "last_3.pth")
    assert status == 2
    assert f"error: {path}: " in text


def odd_numbers(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"seed": 3, "step": "two"}\n\xff\xfe\n[[[{"seed": 3, "step": -5}\n')
    (run_dir / "timing.jsonl").write_bytes(bytes(300))


def near_names(run_dir: Path) -> None:
    for name in ("last_3.pth.bak", "last_x.pth", "last_²3.pth", "last_03.pth", "1.2.3_0_3.pth"):
        (run_dir / name).write_bytes(b"?")
    (run_dir / "9.9_9_99.pth").mkdir()


def killed_start(run_dir: Path) -> None:
    for name in (".last_3.pth.tmp", ".previous_3.pth.tmp", ".config_3.yml.tmp", ".metrics.lock"):
        (run_dir / name).write_bytes(b"half")
    (run_dir / ".tokenizer.1").mkdir()
    (run_dir / "set_aside").mkdir()


def no_newest(run_dir: Path) -> None:
    (run_dir / "last_3.pth").unlink()


def all_damaged(run_dir: Path) -> None:
    for path in run_dir.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])


def a_folder_in_its_place(run_dir: Path) -> None:
    (run_dir / "last_3.pth").unlink()
    odd_file(run_dir / "last_3.pth", "a folder")


def a_pipe_in_its_place(run_dir: Path) -> None:
    (run_dir / "last_3.pth").unlink()
    odd_file(run_dir / "last_3.pth", "a named pipe")


def set_aside_is_a_file(run_dir: Path) -> None:
    (run_dir / "set_aside").touch()
    (run_dir / "last_3.pth").write_bytes(b"")


@pytest.mark.parametrize(
    "make",
    [
        odd_numbers,
        near_names,
        killed_start,
        no_newest,
        all_damaged,
        a_folder_in_its_place,
        a_pipe_in_its_place,
        set_aside_is_a_file,
    ],
)
def test_a_requeued_job_completes(
    base: Path,
    ckpt_dir: Path,
    continued: dict[str, Any],
    make: Callable[[Path], None],
    table: Table,
) -> None:
    """With any damage to its directory, `ckpt=auto` ends with the weights of the whole run."""
    run_dir = ckpt_dir / "run"
    make(run_dir)
    status, text = attempt(table, "run directories, continued", base, ckpt_dir, "auto")
    assert status == 0, text
    given = torch.load(run_dir / "last_3.pth", weights_only=True)["model"]
    assert all(torch.equal(given[name], value) for name, value in continued.items())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "train_loss" in line] == [0, 1]
