from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST = 75
UNTIL_THE_FIRST_STEP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook
from vilmedic import cli

def tell(*_):
    print(*(name for name in sys.modules if name.partition(".")[0] == "vilmedic"), flush=True)
    os._exit(0)

register_optimizer_step_pre_hook(tell)
sys.exit(cli.train())
"""


def test_few_modules_are_loaded_before_the_first_step(tiny: list[str], tmp_path: Path) -> None:
    """These are the files that a debugger steps through."""
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_THE_FIRST_STEP, *tiny, f"ckpt_dir={tmp_path}", "name=short"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert "vilmedic.training.step" in loaded
    assert len(loaded) <= MOST, "\n".join(sorted(loaded))
