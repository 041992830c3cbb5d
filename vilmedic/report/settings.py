"""The configuration of a run as the page shows it, with what the command line set marked."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vilmedic.config.overrides import parse_override
from vilmedic.config.yaml_source import read_yaml
from vilmedic.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass
class Settings:
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


def read_settings(run_dir: Path) -> list[Settings]:
    """The settings of every seed of a run directory, the newest first."""
    paths = sorted(run_dir.glob("config_*.yml"), key=lambda p: (-p.stat().st_mtime, p.name))
    found = []
    for path in paths:
        seed = path.stem.removeprefix("config_")
        if not re.fullmatch("[0-9]{1,20}", seed):
            continue
        environment = _read_json(run_dir / f"environment_{seed}.json")
        overrides = [str(word) for word in environment.get("overrides") or ()]
        text = path.read_text(encoding="utf-8")
        try:
            data, marks = read_yaml(text, str)
        except ConfigError as error:
            logger.warning("%s is left out of the report: %s", path, error)
            continue
        numbers = {key: int(mark.origin) for key, mark in marks.items()}
        marked = {line for word in overrides for line in _lines_of(word, numbers)}
        found.append(
            Settings(
                seed=int(seed),
                lines=[(line, n in marked) for n, line in enumerate(text.splitlines(), start=1)],
                overrides=overrides,
                environment=_environment(environment),
                data=data if isinstance(data, dict) else {},
            )
        )
    return found


def _lines_of(word: str, numbers: dict[Any, int]) -> list[int]:
    """The lines that a word of the command line is the reason for."""
    try:
        path = parse_override(word).path
    except ConfigError:
        return []
    depth = len(path)
    return [
        line
        for key, line in numbers.items()
        if len(key) >= depth and tuple(str(part) for part in key[:depth]) == path
    ]


def _environment(content: dict[str, Any]) -> list[tuple[str, str]]:
    command = content.get("command")
    rows = {"command": " ".join(map(str, command)) if isinstance(command, list) else None}
    rows |= {key: content.get(key) for key in ("git_commit", "device", "python", "platform")}
    versions = content.get("versions")
    if isinstance(versions, dict):
        rows["packages"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [(key.replace("_", " "), str(value)) for key, value in rows.items() if value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
