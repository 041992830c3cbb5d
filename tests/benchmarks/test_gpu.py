"""The GPU benchmark, run on a CPU at trial sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_timing import Device
from benchmarks.published_systems import CONTRASTIVE, SYSTEMS
from tests.parity.reference import missing_packages

PLAIN = {*CONTRASTIVE} | (set() if missing_packages() else {"VAE", "DALLE"})


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", *options])
    with torch.random.fork_rng():
        gpu.main()
    torch.compiler.set_stance("default")


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict[str, Any]:
    """The results of a run without failures."""
    run(monkeypatch, "--out", str(folder / "gpu.json"), *options)
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    assert [path.name for path in folder.iterdir()] == ["gpu.json"]
    assert found["failed"] == {}
    assert set(found["skipped"].values()) <= {
        "TF32 products: a CPU has none",
        "this torch has no functional.linear_cross_entropy",
        f"{', '.join(missing_packages())}: not installed",
    }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name in gpu.SECTIONS if name != "steps"])
def test_a_section_writes_its_results(
    section: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = measured(monkeypatch, tmp_path, "--only", section)
    assert list(found["seconds"]) == [section]
    figures = found[section]
    assert figures
    if section == "losses":
        assert figures["local ieee"]["words_error"] < 1e-5
    elif section == "correct":
        assert figures["ConVIRT gradient by chunks"]["relative_error"] < 1e-5
        assert figures["cross-entropy gradient fp32"]["weight"] < 1e-5
    elif section == "generation":
        assert len(figures["5 images ieee"]["tokens"]) == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_training_steps_write_their_results(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = measured(monkeypatch, tmp_path, "--only", "steps", "--systems", name)["steps"]
    assert all(key.startswith(name) for key in steps)
    for label in ("as set", "ieee", "bf16", "bf16 checkpointed"):
        row = steps[f"{name} 4 {label}"]
        assert row["samples_s"] > 0
        assert row["tflop"] > 0
    assert steps[f"{name} 4 bf16"]["kernels"] > 100
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "gpu"
    if name in PLAIN:
        assert last["ratio"] == pytest.approx(last["ours"] / last["peer"], abs=0.01)
    else:
        assert last["ratio"] is None
    if name in CONTRASTIVE:  # the same networks, so both need about the same operations
        ours, plain = (steps[f"{name} 4 ieee{who}"]["tflop"] for who in ("", " plain"))
        assert ours == pytest.approx(plain, rel=0.02)


def test_compares_with_older_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before: dict[str, Any] = {"about": {"cores": 1}, "peaks": {"launch": {"us": 1e6}}}
    (tmp_path / "before.json").write_text(json.dumps(before))
    run(monkeypatch, "--only", "peaks", "--before", str(tmp_path / "before.json"))
    lines = capsys.readouterr().out.splitlines()
    [row] = [line for line in lines if line.startswith("| peaks")]
    assert row.startswith("| peaks: launch: us | 1e+06 | ")
    assert json.loads(lines[-1])["ratio"] is None


def test_stalls_name_the_line_that_reads_a_number() -> None:
    device = Device(torch.device("cpu"), 0)
    value = torch.ones(())
    lines = device.stalls(lambda: (value.item(), value.item()))
    [(line, count)] = lines.items()
    assert line.startswith("tests/benchmarks/test_gpu.py:")
    assert count == 2


def test_a_failed_measurement_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*arguments: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr("benchmarks.gpu_sections._chunk_error", broken)
    run(monkeypatch, "--only", "correct", "--out", str(tmp_path / "gpu.json"))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"]["correct: SimCLR gradient by chunks"] == "ValueError: broken"
    assert "cross-entropy gradient fp16" in found["correct"]
