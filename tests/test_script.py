from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vilmedic.script import MODULES

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("bin/*.py"), *ROOT.glob("data/*.py")])


def test_required_modules_match_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    required = text[text.index("dependencies = [") : text.index("[project.optional")]
    assert set(re.findall(r'^    "([\w-]+)', required, re.MULTILINE)) == set(MODULES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_missing_packages_give_one_line(script: Path, tmp_path: Path) -> None:
    # The script must not import another installed vilmedic.
    (tmp_path / "vilmedic").mkdir()
    (tmp_path / "vilmedic" / "__init__.py").write_text("raise SystemExit('another vilmedic')\n")
    done = subprocess.run(
        [sys.executable, "-S", str(script), "--help"],  # -S hides installed packages
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "lacks packages that vilmedic needs (torch, " in line
    assert f"`make setup` in {ROOT} and use" in line


def test_ctrl_c_during_the_imports_gives_one_line() -> None:
    code = "import vilmedic.script; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_other_errors_keep_their_traceback() -> None:
    code = "import vilmedic.script; raise RuntimeError('why')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "RuntimeError: why" in done.stderr
