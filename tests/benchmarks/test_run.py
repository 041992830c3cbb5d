"""Every benchmark runs, at sizes whose figures mean nothing, and ends with one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.reference import missing_packages

ROOT = Path(__file__).parents[2]
SMALL_DALLE = (
    "--dim 16 --depth 1 --heads 2 --dim-head 8 --text-len 6 --image-side 2 --words 20 --codes 16"
)
SIZES = {
    "constant_memory": "--systems GLoRIA --batches 8 16 --pixels 32 --repetitions 1",
    "convirt_step": "--tiny --rounds 1 --batches 2 --peak 1 --repetitions 1",
    "dalle_generate": f"{SMALL_DALLE} --repetitions 1",
    "dalle_step": f"{SMALL_DALLE} --batch-size 2 --repetitions 1",
    "gloria_loss": "--images 3 --reports 3 --width 8 --grid 4 --repetitions 1",
    "input_pipeline": "--images 4 --size 96 --resize 64 --crop 56 --batch-size 2 --rounds 1",
    "make_mimic_cxr": "--studies 60",
    "scaling": "--worlds 8 --no-check",
    "vae_step": "--batch-size 2 --image-size 32 --num-tokens 32 --codebook-dim 8 --hidden-dim 8"
    " --repetitions 1",
}
COMPARED = {"dalle_generate", "dalle_step", "vae_step"}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_runs_and_prints_its_figures(name: str, tmp_path: Path) -> None:
    if name in COMPARED and (missing := missing_packages()):
        pytest.skip(f"the other side is {', '.join(missing)}; `make test` installs it")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *SIZES[name].split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"].startswith(name)
    figures = [value for key, value in result.items() if key not in ("name", "unit")]
    assert figures
    assert all(value > 0 for value in figures)


def test_every_benchmark_is_tried() -> None:
    with_figures = {
        path.stem for path in ROOT.glob("benchmarks/*.py") if "main()" in path.read_text()
    }
    assert with_figures == set(SIZES)
