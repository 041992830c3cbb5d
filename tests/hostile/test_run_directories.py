"""Randomly damaged run directories still get a page, and damaged files are named."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from pathlib import Path

import pytest

from tests.hostile.table import Table
from tests.report.runs import results, write_run
from vilmedic import cli
from vilmedic.evaluation.evaluations import EvaluationFolder

RUNS = 30
INSERTED = (
    b"\0",
    b"\xff",
    b"\x1b[2J",
    b"[" * 3000,
    b"9" * 5000,
    b"{}",
    b"null,",
    b"<script>",
    b"\n",
)
VALUES = (None, True, -1, 10**400, 1e308, "", "../../x", "$x^{", [], [[]], {}, {"a": {}})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = write_run(tmp_path_factory.mktemp("ckpt") / "run", samples=7)
    for name in ("metrics", "timing"):  # few panels, because drawing takes most of the time
        text = json.dumps({"seed": 1, "step": 1, "loss": 2.5, "lr": 0.1}) + "\n"
        (run_dir / f"{name}.jsonl").write_text(text * 3)
    about = {"system": "ConVIRT", "checkpoints": results()["checkpoints"], "generated": False}
    one = EvaluationFolder(run_dir, "best-1", ema=False, settings={}, about=about)
    one.write(results())
    shutil.copy(run_dir / "test_full_visual.png", one.path)
    return run_dir


def damage(path: Path, draw: random.Random) -> None:
    """Change the bytes of a file, or a value in it."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    kind = draw.randrange(6)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        content[place : place + 50] = draw.randbytes(50)
    elif kind == 2:
        content[place:place] = draw.choice(INSERTED)
    elif kind == 3:
        content[place] = draw.randrange(256)
    elif path.suffix == ".json":
        content = bytearray(odd_value(json.loads(content), draw).encode())
    elif path.suffix == ".jsonl":
        lines = [odd_value(json.loads(line), draw) for line in content.splitlines()]
        content = bytearray("\n".join(lines).encode() + b"\n")
    else:
        content *= 2
    path.write_bytes(content)


def odd_value(data: object, draw: random.Random) -> str:
    """JSON with one value in it replaced."""
    holder, key = [data], 0
    places: list[tuple[list[object] | dict[str, object], object]] = [(holder, key)]
    for inside, at in places:
        value = inside[at]  # type: ignore[call-overload, index]
        keys = range(len(value)) if isinstance(value, list) else value
        places += [(value, k) for k in keys] if isinstance(value, list | dict) else []
    inside, at = draw.choice(places)
    inside[at] = draw.choice(VALUES)  # type: ignore[call-overload, index]
    return json.dumps(holder[0])


@pytest.mark.parametrize("number", range(RUNS))
def test_every_damaged_run_gets_a_page(
    whole: Path, tmp_path: Path, number: int, table: Table
) -> None:
    draw = random.Random(number)
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    files = sorted(path for path in run_dir.rglob("*") if path.is_file())
    for path in draw.sample(files, draw.randint(1, 4)):
        damage(path, draw)
    out, err = io.StringIO(), io.StringIO()

    def report() -> str | None:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.report([str(run_dir)])
        assert status in (0, cli.BROKEN)
        assert bool(status) == bool(err.getvalue())
        return err.getvalue() or None

    message = table.attempt("run directories, reported", f"number {number}", report, seconds=30)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert ("Left out, as it cannot be read" in page) == bool(message)
    assert not {"\x1b", "\0"} & set(page + out.getvalue() + err.getvalue())
