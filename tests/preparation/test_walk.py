from __future__ import annotations

from pathlib import Path

from vilmedic.preparation.walk import walk_files


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "b").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    for path in (root / "z.png", root / "b" / "y.png", other / "x.png", other / "deep" / "w.png"):
        path.write_text("")
    (root / "a").symlink_to(other)
    (root / "c").symlink_to(other / "deep")  # reached twice, and not a loop
    (root / "b" / "up").symlink_to(root)
    (other / "deep" / "back").symlink_to(root / "b")
    (root / "nowhere.png").symlink_to(tmp_path / "gone")
    (root / "self").symlink_to(root / "self")
    found = [str(path.relative_to(root)) for path in walk_files(root)]
    assert found[:5] == ["nowhere.png", "self", "z.png", "a/x.png", "a/deep/w.png"]
    assert {"c/w.png", "b/y.png", "a/deep/back/y.png"} < set(found)
    assert not any("up" in name.split("/")[2:] for name in found)
    assert len(found) < 20


def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    failed: list[OSError] = []
    assert list(walk_files(tmp_path / "none", failed.append)) == []
    assert [error.filename for error in failed] == [str(tmp_path / "none")]
