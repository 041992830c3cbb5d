from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.errors import ConfigError
from vilmedic.executors.run_directory import choose_seed, git_commit, used_seeds


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
