"""Damaged run directories: the page shows the intact parts and names the damaged ones."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.report.runs import results, write_explorer, write_run
from vilmedic import cli
from vilmedic.checkpoints.left_out import MOST_LISTED, LeftOut
from vilmedic.evaluation.evaluations import EvaluationFolder
from vilmedic.report import curves
from vilmedic.report.curves import read_curves
from vilmedic.report.page import write_report

INDEX = "evaluations/index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = write_run(tmp_path_factory.mktemp("ckpt") / "demo")
    write(run_dir / "metrics.jsonl", LINE)  # one panel, because drawing takes most of the time
    (run_dir / "results_validate.json").write_text(json.dumps(results() | {"split": "validate"}))
    about = {"system": "ConVIRT", "checkpoints": results()["checkpoints"], "generated": False}
    one = EvaluationFolder(run_dir, "best-1", ema=False, settings={}, about=about)
    one.write(results() | {"samples": 40})
    write_explorer(one.path, 7)
    Image.new("L", (30, 20)).save(run_dir / "note.png")
    (run_dir / "note.json").write_text(json.dumps({"caption": "A note."}))
    return run_dir


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "demo"))


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change(path: Path, **values: Any) -> None:
    write(path, json.dumps(json.loads(path.read_text()) | values))


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def listener(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(path.parent)
        one.bind(path.name)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def cut(path: Path) -> None:
    write(path, path.read_bytes()[: path.stat().st_size // 2])


def huge_picture(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    write(path, b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def index(path: Path, entry: Any) -> None:
    write(path, json.dumps([*json.loads(path.read_text()), entry]))


def explorer(path: Path, **values: Any) -> None:
    content = json.loads(gzip.decompress(path.read_bytes())) | values
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


LINE = b'{"seed": 1, "step": 31, "loss": 0.1}\n'
DEEP = "[" * 100_000
PREVIOUS = "../../../demo"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "metrics: not UTF-8": ("metrics.jsonl", lambda p: write(p, b"\xff\xfe\n" + LINE), "1 of 2"),
    "metrics: odd steps": (
        "metrics.jsonl",
        lambda p: write(p, b'{"seed": 1, "step": "x"}\n{"seed": [], "step": 1}\n[]\n' + LINE),
        "3 of 4 lines",
    ),
    "metrics: deep": ("metrics.jsonl", lambda p: write(p, DEEP.encode() + b"\n" + LINE), "1 of 2"),
    "timing: cut and zeros": ("timing.jsonl", lambda p: write(p, bytes(99) + b"\n"), "1 of 1"),
    "timing: a folder": ("timing.jsonl", folder, "it is a folder, not a file"),
    "timing: a pipe": ("timing.jsonl", pipe, "it is a named pipe"),
    "configuration: not UTF-8": ("config_1.yml", lambda p: write(p, b"name: \xff\n"), "not UTF-8"),
    "configuration: cut": ("config_1.yml", lambda p: write(p, "a: [1, "), "not valid YAML"),
    "configuration: empty": ("config_1.yml", lambda p: write(p, ""), "it is no configuration"),
    "configuration: a list": ("config_1.yml", lambda p: write(p, "- 1"), "it is no configuration"),
    "configuration: deep": ("config_1.yml", lambda p: write(p, "a: " + DEEP), "deeper than"),
    "configuration: a pipe": ("config_1.yml", pipe, "it is a named pipe"),
    "configuration: a device": ("config_1.yml", device, "it is a device"),
    "environment: cut": ("environment_1.json", cut, "not JSON"),
    "environment: a list": (
        "environment_1.json",
        lambda p: write(p, "[]"),
        "not what a run writes",
    ),
    "environment: odd words": ("environment_1.json", lambda p: change(p, overrides=3), "no list"),
    "environment: a folder": ("environment_1.json", folder, "it is a folder"),
    "results: cut": ("results_test.json", cut, "not JSON"),
    "results: deep": ("results_test.json", lambda p: write(p, DEEP), "too deeply"),
    "results: not UTF-8": ("results_test.json", lambda p: write(p, b'{"a": "\xff"}'), "not UTF-8"),
    "results: samples": ("results_test.json", lambda p: change(p, samples="9"), "samples"),
    "results: split": ("results_test.json", lambda p: change(p, split=["test"]), "split"),
    "results: metrics": ("results_test.json", lambda p: change(p, metrics=[1]), "not what a run"),
    "results: a metric": (
        "results_test.json",
        lambda p: change(p, metrics={"knn": [{}]}),
        "not what a run writes",
    ),
    "results: baselines": ("results_test.json", lambda p: change(p, baselines=7), "not what"),
    "results: checkpoints": ("results_test.json", lambda p: change(p, checkpoints=[1]), "not what"),
    "results: no system": ("results_test.json", lambda p: write(p, "{}"), "it lacks"),
    "results: a socket": ("results_test.json", listener, "it is a socket"),
    "results: a folder": ("results_test.json", folder, "it is a folder"),
    "index: cut": (INDEX, cut, "not JSON"),
    "index: no list": (INDEX, lambda p: write(p, '{"folder": "a"}'), "it holds no list"),
    "index: an entry": (INDEX, lambda p: index(p, 7), "entry 2: it names no folder"),
    "index: a folder outside": (
        INDEX,
        lambda p: index(p, {"folder": PREVIOUS, "numbers": {"test": {}}}),
        "entry 2: its folder: it would be written outside",
    ),
    "index: a folder that is gone": (
        INDEX,
        lambda p: index(p, {"folder": "gone", "numbers": {"test": {}}}),
        "entry 2: there is no folder gone",
    ),
    "index: a pipe": (INDEX, pipe, "it is a named pipe"),
    "explorer: cut": ("test_explorer.json.gz", cut, "end-of-stream"),
    "explorer: no gzip": ("test_explorer.json.gz", lambda p: write(p, "{}"), "gzip"),
    "explorer: other lengths": (
        "test_explorer.json.gz",
        lambda p: explorer(p, labels=["a"], maps=[{"x": [1], "y": [1]}]),
        "not of one length",
    ),
    "explorer: a list": (
        "test_explorer.json.gz",
        lambda p: write(p, gzip.compress(b"[]")),
        "not what a run writes",
    ),
    "explorer: bytes without end": (
        "test_explorer.json.gz",
        lambda p: write(p, gzip.compress(bytes(2**20)) * 500),
        "unpacks to more than",
    ),
    "explorer: a folder": ("test_explorer.json.gz", folder, "it is a folder"),
    "picture: cut": ("test_full_visual.png", cut, "truncated"),
    "picture: empty": ("test_full_visual.png", lambda p: write(p, ""), "cannot identify"),
    "picture: huge": ("test_full_visual.png", huge_picture, "pixels"),
    "picture: a pipe": ("test_full_visual.png", pipe, "it is a named pipe"),
    "picture: a folder": ("test_full_visual.png", folder, "it is a folder"),
    "caption: cut": ("note.json", cut, "not JSON"),
    "caption: a pipe": ("note.json", pipe, "it is a named pipe"),
    "curves.png: a folder": ("curves.png", folder, "directory"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_and_the_rest_is_shown(
    damage: str, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir)
    name, act, reason = DAMAGE[damage]
    if name == "test_explorer.json.gz":  # the latest evaluation has its own
        name = f"{next(run_dir.glob('evaluations/best*')).relative_to(run_dir)}/{name}"
    act(run_dir / name)

    assert cli.report([str(run_dir)]) == cli.BROKEN

    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if f"{name} is left out of the report: " in line], told
    assert any(reason in line for line in told), told
    page = (run_dir / "report.html").read_text()
    assert f"<code>{name}</code>: " in page
    expected = {
        "curves": "metrics" not in name,
        "results": True,
        "explorer": "explorer" not in name,
        "kind-1": True,
        "configuration": "config" not in name,
    }
    for section, there in expected.items():
        assert f'<section id="{section}">' in page or not there, section
    assert "ConVIRT, epoch 3, seed 1" in page or "results" in name


def test_an_intact_run_is_shown_completely(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run_dir / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"seed": 1, "st')  # half a line, as a running training writes it
    assert cli.report([str(run_dir)]) == 0
    assert capsys.readouterr().err == ""
    assert 'id="left-out"' not in (run_dir / "report.html").read_text()


def test_with_a_damaged_index_folders_are_searched(run_dir: Path) -> None:
    whole = [line for line in write_report(run_dir).read_text().splitlines() if "best-1-" in line]
    write(run_dir / INDEX, "{")
    left_out = LeftOut(run_dir)
    page = write_report(run_dir, left_out).read_text().splitlines()
    assert [name for name, _ in left_out.reasons] == [INDEX]
    assert whole
    assert [line for line in page if "best-1-" in line] == whole


def test_a_run_with_only_damaged_files_gets_a_page(tmp_path: Path) -> None:
    (tmp_path / "config_1.yml").write_text("a: [")
    (tmp_path / "metrics.jsonl").mkdir()
    assert cli.report([str(tmp_path)]) == cli.BROKEN
    page = (tmp_path / "report.html").read_text()
    assert "<code>config_1.yml</code>" in page
    assert "<code>metrics.jsonl</code>" in page


def test_a_page_that_cannot_be_written_is_an_error(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "report.html").mkdir()
    assert cli.report([str(run_dir)]) == cli.FAILED
    assert f"error: {run_dir}: no page can be written there: Is a dir" in capsys.readouterr().err
    assert not list(run_dir.glob(".*.tmp"))


def test_an_unwritable_folder_is_an_error(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: object, **_: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, refuse)
    assert cli.report([str(run_dir)]) == cli.FAILED
    assert "Read-only file system" in capsys.readouterr().err


def test_every_run_is_processed_and_the_worst_status_is_returned(
    run_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    write(run_dir / "note.png", "")
    words = [str(run_dir), str(tmp_path / "none"), str(other)]
    assert cli.report(words) == cli.FAILED
    assert cli.report([words[0], words[2]]) == cli.BROKEN
    assert (other / "report.html").exists()


@pytest.mark.parametrize("word", ["", "\0", "x" * 5000, "/dev/null"])
def test_invalid_arguments_give_no_traceback(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.report([word]) == cli.FAILED


def test_reading_figures_starts_no_other_program(run_dir: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file\nshowpage\n"
    write(run_dir / "note.png", script)
    left_out = LeftOut(run_dir)
    write_report(run_dir, left_out)
    assert [name for name, _ in left_out.reasons] == ["note.png"]
    assert not marker.exists()


def test_damaged_figures_do_not_count_against_the_limit(run_dir: Path) -> None:
    for number in range(40):
        write(run_dir / f"attention_{number:02}.png", "")
    Image.new("L", (9, 9)).save(run_dir / "attention_99.png")
    page = write_report(run_dir).read_text()
    assert 'alt="attention_99.png"' in page


def test_many_skipped_files_are_counted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(MOST_LISTED + 9):
        write(run_dir / f"note_{number}.png", "")
    assert cli.report([str(run_dir)]) == cli.BROKEN
    told = capsys.readouterr().err.splitlines()
    assert len(told) == MOST_LISTED + 1
    assert told[-1].startswith("and 9 more")
    page = (run_dir / "report.html").read_text()
    assert page.count("<li><code>note_") == MOST_LISTED
    assert "and 9 more." in page


def test_names_are_escaped_on_the_console_and_in_curves(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run_dir / "a\x1b[31m.png", "")
    odd = {
        "$x^{$_loss": 1e308,
        "$\\frac$_loss": -1e299,
        "_loss": 1,
        "\x1b[31m": 10**400,
        "é": 1e299,
    }
    (run_dir / "metrics.jsonl").write_text(json.dumps({"seed": 1, "step": 1} | odd) + "\n")
    other = run_dir.rename(run_dir.with_name("$a_{$"))
    assert cli.report([str(other)]) == cli.BROKEN
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "curves.png" not in captured.err
    assert "a\\x1b[31m.png" in captured.err


def test_the_number_of_curves_and_seeds_is_limited(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MOST_NAMES", 3)
    many = {f"n{number}": number for number in range(3000)}
    lines = [{"seed": seed, "step": 1} | many for seed in range(5)]
    write(run_dir / "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    (run_dir / "timing.jsonl").unlink()
    drawn = read_curves(run_dir, left_out := LeftOut(run_dir))
    assert {(line.name, line.seed) for line in drawn} == {
        (f"n{number}", seed) for number in range(3) for seed in range(3)
    }
    assert left_out.reasons == [
        ("metrics.jsonl", "of its 3,000 numbers all but 3"),
        ("metrics.jsonl", "of its 5 seeds all but 3"),
    ]


def test_unusual_sections_of_a_configuration_are_shown(run_dir: Path) -> None:
    write(run_dir / "config_1.yml", "trainor: [1]\nmodel: text\n")
    left_out = LeftOut(run_dir)
    assert "trainor: [1]" in write_report(run_dir, left_out).read_text()
    assert left_out.reasons == []
