"""Every benchmark runs at a trial size and prints its results last."""

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
    "--dim 16 --depth 1 --heads 2 --dim-head 16 --text-len 6 --image-side 2 --words 20 --codes 16"
)
SIZES = {
    "compare": "--runs 10 --repetitions 1",
    "constant_memory": "--systems GLoRIA --batches 16 --pixels 32 --repetitions 1",
    "convirt_step": "--tiny --rounds 1 --batches 2 --peak 1 --repetitions 1",
    "dalle_generate": f"{SMALL_DALLE} --repetitions 1",
    "dalle_step": f"{SMALL_DALLE} --batch-size 2 --repetitions 1",
    "embed": "--images 4 --size 96 --resize 64 --crop 56 --batch-size 2 --repetitions 1"
    " --backbone shufflenet_v2_x0_5",
    "frozen_tower": "--tiny --systems image --train 8 --validate 16 --pixels 32 --epochs 2 --keys"
    " dataset.image.resize=32 dataset.image.crop=32",
    "gloria_loss": "--images 3 --reports 3 --width 8 --grid 4 --repetitions 1",
    "input_pipeline": "--images 4 --size 96 --resize 64 --crop 56 --batch-size 2 --rounds 1",
    "make_mimic_cxr": "--studies 60",
    "plan": "--configs phantom/vae.yml --keys trainor.device=cpu trainor.batch_size=2",
    "retrieval": "--pairs 300 --width 8 --repetitions 1 --loop",
    "vae_step": "--batch-size 2 --image-size 32 --num-tokens 32 --codebook-dim 8 --hidden-dim 8"
    " --repetitions 1",
}
COMPARED = {"dalle_generate", "dalle_step", "vae_step"}


def lines_of(name: str, options: str, folder: Path) -> list[str]:
    """The lines that a benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options.split()],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_benchmark_prints_its_results(name: str, tmp_path: Path) -> None:
    if name in COMPARED and (missing := missing_packages()):
        pytest.skip(f"needs {', '.join(missing)}; `make test` installs it")
    result = json.loads(lines_of(name, SIZES[name], tmp_path)[-1])
    assert result["name"].startswith(name)
    assert result["ratio"] > 0
    assert list(tmp_path.iterdir()) == []  # no figure unless requested


CODE = """
import runpy, sys
from tests.parity import reference
reference.PACKAGES = ("no_such_package",)
for script in sys.argv[1:]:
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""


def test_missing_reference_names_the_install_command(tmp_path: Path) -> None:
    scripts = [str(ROOT / "benchmarks" / f"{name}.py") for name in COMPARED]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *scripts],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    sentence = "This comparison needs no_such_package; run `make reference`."
    assert (done.stdout.splitlines(), done.stderr) == ([sentence] * 3, "")


def test_the_table_of_scaling_has_a_line_for_each_system(tmp_path: Path) -> None:
    lines = lines_of("scaling", "--worlds 8 --no-check", tmp_path)
    assert [line.split()[1] for line in lines[-3:]] == ["ConVIRT", "SimCLR", "GLoRIA"]


def test_every_benchmark_is_tested() -> None:
    scripts = {path.stem for path in ROOT.glob("benchmarks/*.py") if "main()" in path.read_text()}
    assert scripts == {*SIZES, "scaling", "gpu"}  # test_gpu.py
