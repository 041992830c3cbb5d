from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.disk import no_file_beyond
from vilmedic.errors import ConfigError
from vilmedic.executors.run_directory import (
    choose_seed,
    git_commit,
    make_run_directory,
    used_seeds,
    write_provenance,
)


def test_seeds_of_earlier_runs_are_known(tmp_path: Path) -> None:
    for name in ("last_3.pth", "config_8.yml", "2.5_1_9.pth", "metrics.jsonl"):
        (tmp_path / name).touch()
    assert used_seeds(tmp_path) == {3, 8}
    assert used_seeds(tmp_path / "absent") == set()


def test_used_seed_is_refused_with_both_remedies(tmp_path: Path) -> None:
    (tmp_path / "last_3.pth").touch()
    with pytest.raises(ConfigError, match=r"ckpt=last_3\.pth, or give another seed"):
        choose_seed(tmp_path, 3)
    assert choose_seed(tmp_path, 4) == 4


def test_drawn_seed_is_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "last_3.pth").touch()
    drawn = iter([3, 3, 11])
    monkeypatch.setattr(
        "vilmedic.executors.run_directory.secrets.randbelow", lambda limit: next(drawn)
    )
    assert choose_seed(tmp_path, None) == 11


def test_commit_is_a_hash_or_unknown() -> None:
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_full_disk_keeps_the_configuration_of_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config: Any = SimpleNamespace(to_yaml=lambda: "epochs: 3\n" * 1000, overrides=[])
    (tmp_path / "config_3.yml").write_text("epochs: 2\n")
    with no_file_beyond(100):
        write_provenance(config, tmp_path, 3, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["config_3.yml"]
    assert (tmp_path / "config_3.yml").read_text() == "epochs: 2\n"
    assert caplog.text.count("could not be written") == 2
    write_provenance(config, tmp_path, 3, "cpu")
    assert len((tmp_path / "config_3.yml").read_text()) == 10_000


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    make_run_directory(tmp_path / "a" / "b")
    make_run_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^ckpt_dir: the folder .*file/run cannot be made: N"):
        make_run_directory(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"^ckpt_dir: the folder /dev/null/run cannot be made"):
        make_run_directory(Path("/dev/null/run"))
