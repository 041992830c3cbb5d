"""The commands that the documentation shows are ones that the configurations accept."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vilmedic import cli

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^ +(?:\.venv/bin/)?python +bin/(train|ensemble)\.py +(config/.*)$")


def commands() -> list[tuple[str, str, str]]:
    """Page with line, script and arguments of each command, continued lines joined."""
    found = []
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if not (match := COMMAND.match(line)):
                continue
            script, words = match.groups()
            rest = number
            while words.endswith("\\"):
                rest += 1
                words = f"{words[:-1]} {lines[rest].strip()}"
            if "..." in words:  # what the reader fills in
                continue
            found.append((f"{page.name}:{number + 1}", script, words))
    return found


@pytest.mark.parametrize(("place", "script", "words"), commands())
def test_command_is_accepted(
    place: str,
    script: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    status = getattr(cli, script)([*shlex.split(words, comments=True), "--check"])
    assert status == 0, f"{place}: {capsys.readouterr().err}"
