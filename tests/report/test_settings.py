from __future__ import annotations

import os
from pathlib import Path

from tests.report.runs import write_run
from vilmedic.report.settings import read_settings


def test_lines_that_the_command_line_set_are_marked(tmp_path: Path) -> None:
    [settings] = read_settings(write_run(tmp_path))

    marked = [line.strip() for line, is_marked in settings.lines if is_marked]
    assert marked == ["name: demo", "batch_size: 8", "optim_params:", "lr: 0.001"]
    assert settings.data["model"] == {"proto": "ConVIRT"}
    assert dict(settings.environment)["packages"] == "torch 2"
    assert "git commit" not in dict(settings.environment)


def test_the_newest_seed_comes_first(tmp_path: Path) -> None:
    write_run(tmp_path, seeds=(1, 2))
    os.utime(tmp_path / "config_2.yml", (1, 1))
    assert [one.seed for one in read_settings(tmp_path)] == [1, 2]


def test_a_run_without_environment_is_shown_without_it(tmp_path: Path) -> None:
    (tmp_path / "config_7.yml").write_text("name: x\n")
    (tmp_path / "config_evil.yml").write_text("a: [")
    [settings] = read_settings(tmp_path)
    assert settings.lines == [("name: x", False)]
    assert settings.environment == []
