from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import pytest

from vilmedic.files import (
    _core_share,
    confined,
    core_count,
    from_spreadsheet,
    open_regular,
    plain_name,
    replace_text,
    spreadsheet_text,
    text_table,
    walk_files,
)


def test_replaces_a_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    replace_text(path, "é\n")
    replace_text(path, "later\n")
    assert path.read_text(encoding="utf-8") == "later\n"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    replace_text(path, "before\n")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "after\n")
    assert path.read_text(encoding="utf-8") == "before\n"
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../x", "outside"),
        ("a/../../x", "outside"),
        ("/etc/x", "outside"),
        ("a\\..\\..\\x", "outside"),
        ("C:\\x", "outside"),
        ("C:x", "outside"),
        ("", "empty"),
        (".", "empty"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("\x1b[31mred", "control"),
        ("\ud800", "control"),
        ("a" * 256, "longer"),
        ("ä" * 128, "longer"),
    ],
)
def test_unsafe_member_names_are_refused(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        confined(tmp_path, name)
    with pytest.raises(ValueError, match=why):
        plain_name(name)


def test_safe_member_names_are_accepted(tmp_path: Path) -> None:
    assert confined(tmp_path, "a/b c..png") == tmp_path / "a" / "b c..png"
    assert confined(tmp_path, "a\\b.png") == tmp_path / "a" / "b.png"
    assert plain_name("Röntgen\u00a0bild..tar") == "Röntgen\u00a0bild..tar"
    for name in ("a/b", "a\\b", "./a", "a/"):
        with pytest.raises(ValueError, match="folder"):
            plain_name(name)


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1", "- effusion"])
def test_formula_cells_are_quoted_and_read_back(text: str) -> None:
    assert spreadsheet_text(text) == f"'{text}"
    assert from_spreadsheet(spreadsheet_text(text)) == text


@pytest.mark.parametrize("text", ["-1", "+1.5e3", "a=b", "", "'quoted'", "'-", "No Finding"])
def test_other_cells_are_unchanged(text: str) -> None:
    assert spreadsheet_text(text) == text


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"content")
    os.symlink("file", "link")
    with open_regular("link") as file:
        assert file.read() == b"content"
    os.mkfifo("pipe")
    os.mkdir("folder")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    kinds = {"pipe": "a named pipe", "folder": "a folder", "socket": "a socket"}
    for name, kind in (kinds | {"/dev/zero": "a device"}).items():
        with pytest.raises(OSError, match=f"it is {kind}, not a file"):
            open_regular(name)
    with pytest.raises(FileNotFoundError):
        open_regular("gone")


def test_links_are_followed_without_endless_loops(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "b").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    for path in (root / "z.png", root / "b" / "y.png", other / "x.png", other / "deep" / "w.png"):
        path.write_text("")
    (root / "a").symlink_to(other)
    (root / "c").symlink_to(other / "deep")  # reached twice, but not a loop
    (root / "b" / "up").symlink_to(root)
    (other / "deep" / "back").symlink_to(root / "b")
    (root / "nowhere.png").symlink_to(tmp_path / "gone")
    (root / "self").symlink_to(root / "self")
    found = [str(path.relative_to(root)) for path in walk_files(root)]
    assert found[:5] == ["nowhere.png", "self", "z.png", "a/x.png", "a/deep/w.png"]
    assert {"c/w.png", "b/y.png", "a/deep/back/y.png"} < set(found)
    assert not any("up" in name.split("/")[2:] for name in found)
    assert len(found) < 20


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path) -> None:
    failed: list[OSError] = []
    assert list(walk_files(tmp_path / "none", failed.append)) == []
    assert [error.filename for error in failed] == [str(tmp_path / "none")]


def test_a_table_of_text_is_aligned() -> None:
    rows = [["", "train", "test"], ["images", "1,200", "-"], ["labels", "7", "12"]]
    assert text_table(rows) == ["        train  test", "images  1,200     -", "labels      7    12"]
    assert text_table([["a"], ["long"]]) == ["a", "long"]


def control_groups(tmp_path: Path, lines: str, files: dict[str, str]) -> float:
    """The result of `_core_share` for a process in groups with the given files."""
    own = tmp_path / "cgroup"
    own.write_text(lines)
    for name, content in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return _core_share(own, tmp_path / "mounted")


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("0::/of/the/machine\n", {"cpu.max": "50000 100000"}, 0.5),
        (
            "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "600000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        ("5:memory:/a\n", {"memory/a/cpu.max": "100000 100000"}, math.inf),
        ("what is this\n", {}, math.inf),
    ],
)
def test_cpu_quota_of_a_control_group(
    tmp_path: Path, lines: str, files: dict[str, str], cores: float
) -> None:
    assert control_groups(tmp_path, lines, files) == cores


def test_core_count_respects_affinity_and_control_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for share, cores in ((math.inf, 12), (64.0, 12), (2.5, 3), (0.2, 1)):
        monkeypatch.setattr("vilmedic.files._core_share", lambda _, share=share: share)
        assert core_count() == cores
    assert _core_share(Path("/nowhere")) == math.inf
