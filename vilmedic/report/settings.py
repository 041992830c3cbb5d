"""Run settings for the report page: configuration, command line, environment, best score."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vilmedic.checkpoints.left_out import LeftOut, read_json
from vilmedic.config.declared import known_better
from vilmedic.config.yaml_source import parse_override, read_file_text, read_yaml
from vilmedic.errors import ConfigError


@dataclass
class RunSettings:
    """Configuration and environment of the run with one seed.

    Args:
        seed: its seed.
        lines: each line of the resolved configuration, and whether the command line set it.
        overrides: the words of the command line.
        environment: name and text of what it was run with.
        data: the configuration itself.
    """

    seed: int
    lines: list[tuple[str, bool]]
    overrides: list[str] = field(default_factory=list)
    environment: list[tuple[str, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def read_settings(run_dir: Path, left_out: LeftOut | None = None) -> list[RunSettings]:
    """The settings of every seed of a run directory, the newest first.

    Args:
        run_dir: the directory.
        left_out: takes the files that cannot be read.
    """
    left_out = left_out or LeftOut(run_dir)
    paths = sorted(run_dir.glob("config_*.yml"), key=lambda p: (-p.lstat().st_mtime, p.name))
    found = []
    for path in paths:
        seed = path.stem.removeprefix("config_")
        if not re.fullmatch("[0-9]{1,20}", seed):
            continue
        settings = RunSettings(int(seed), [])
        recorded = run_dir / f"environment_{seed}.json"
        if recorded.exists():  # runs of earlier versions have none
            with left_out.damaged(recorded):
                _read_environment(recorded, settings)
        with left_out.damaged(path):
            _read_configuration(path, settings)
            found.append(settings)
    return found


def score_of(
    run_dir: Path, settings: Sequence[RunSettings], left_out: LeftOut
) -> tuple[str, str | None]:
    """The score that chooses the checkpoints of a run, and what of it is better.

    Args:
        run_dir: the directory.
        settings: what `read_settings` gives.
        left_out: takes a checkpoint that cannot be read.

    Returns:
        The score, empty if unknown; `higher`, `lower`, or None if the direction is unknown.
    """
    score = str(section(settings, "trainor").get("early_stop_metric") or "")
    better = known_better(score) if score else None
    newest = run_dir / f"last_{settings[0].seed}.pth" if settings else run_dir
    if score and better is None and newest.is_file():
        # A metric of a plugin: the run itself knows. Imported here, as it brings torch.
        from vilmedic.checkpoints.checkpoint import better_of, read_header

        with left_out.damaged(newest):
            state = read_header(newest)
            better = better_of(state) if state.get("metric") == score else None
    return score, better


def section(settings: Sequence[RunSettings], name: str) -> dict[str, Any]:
    """A section of the configuration of the newest run; empty where there is none."""
    found = settings[0].data.get(name) if settings else None
    return found if isinstance(found, dict) else {}


def data_of(settings: Sequence[RunSettings]) -> str:
    """The name of the data that was trained on: that of its first folder; empty for none."""
    dataset = section(settings, "dataset")
    sections = [dataset, *(one for one in dataset.values() if isinstance(one, dict))]
    roots = [str(one["root"]) for one in sections if one.get("root")]
    return Path(roots[0]).name if roots else ""


def _read_configuration(path: Path, settings: RunSettings) -> None:
    text = read_file_text(str(path))
    try:
        data, marks = read_yaml(text, lambda line: f"line {line}")
    except ConfigError as error:
        raise ConfigError(f"it is no configuration: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError("it is no configuration, which is a mapping of keys to values")
    given = {path for word in settings.overrides for path in _path_of(word)}
    marked = {
        int(mark.origin.removeprefix("line "))
        for key, mark in marks.items()
        if any(tuple(map(str, key[:depth])) in given for depth in range(1, len(key) + 1))
    }
    lines = enumerate(text.splitlines(), start=1)
    settings.lines = [(line, number in marked) for number, line in lines]
    settings.data = data


def _path_of(word: str) -> list[tuple[str, ...]]:
    """The key that a word of the command line sets; none for a word that sets none."""
    try:
        return [parse_override(word).path]
    except ConfigError:
        return []


def _read_environment(path: Path, settings: RunSettings) -> None:
    content = read_json(path)
    overrides = content.get("overrides") or []
    if not isinstance(overrides, list):
        raise ValueError("its overrides are no list")
    settings.environment = _environment_rows(content)
    settings.overrides = [str(word) for word in overrides]


def _environment_rows(content: dict[str, Any]) -> list[tuple[str, str]]:
    command = content.get("command")
    rows = {"command": " ".join(map(str, command)) if isinstance(command, list) else None}
    rows |= {key: content.get(key) for key in ("git_commit", "device", "python", "platform")}
    versions = content.get("versions")
    if isinstance(versions, dict):
        rows["packages"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [(key.replace("_", " "), str(value)) for key, value in rows.items() if value]
