"""The measurements of a GPU, here on a CPU at sizes whose figures mean nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_timing import Device
from benchmarks.published_systems import SYSTEMS
from tests.parity.reference import missing_packages

PLAIN = {"ConVIRT", "SimCLR", "GLoRIA"} | (set() if missing_packages() else {"VAE", "DALLE"})


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", *options])
    with torch.random.fork_rng():
        gpu.main()
    torch.compiler.set_stance("default")


@pytest.mark.slow
def test_every_section_gives_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    run(monkeypatch, "--out", str(out))
    found = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert found["failed"] == {}
    lacking = set(found["skipped"].values())
    assert lacking <= {
        "TF32 products: a CPU has none",
        "this torch has no functional.linear_cross_entropy",
        f"{', '.join(missing_packages())}: not installed",
    }
    assert list(found["seconds"]) == list(gpu.SECTIONS)
    for section in gpu.SECTIONS:
        assert found[section], section

    steps = found["steps"]
    for name in SYSTEMS:
        for label in ("as set", "ieee", "bf16", "bf16 checkpointed"):
            row = steps[f"{name} 4 {label}"]
            assert row["samples_s"] > 0
            assert row["tflop"] > 0
        assert steps[f"{name} 4 bf16"]["kernels"] > 100
        assert (f"{name} 4 bf16 plain" in steps) == (name in PLAIN)
    # the same networks: what both compute in products differs by little
    for name in ("ConVIRT", "SimCLR", "GLoRIA"):
        ours, plain = (steps[f"{name} 4 ieee{who}"]["tflop"] for who in ("", " plain"))
        assert ours == pytest.approx(plain, rel=0.02)
    assert found["losses"]["local ieee"]["words_error"] < 1e-5
    assert found["correct"]["ConVIRT gradient by chunks"]["relative_error"] < 1e-5
    assert found["correct"]["cross-entropy gradient fp32"]["weight"] < 1e-5
    assert len(found["generation"]["5 images ieee"]["tokens"]) == 16
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "gpu"
    assert last["ratio"] == pytest.approx(last["ours"] / last["peer"], abs=0.01)


def test_compares_with_figures_of_before(
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


def test_a_figure_that_cannot_be_had_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*arguments: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr("benchmarks.gpu_sections._chunk_error", broken)
    run(monkeypatch, "--only", "correct", "--out", str(tmp_path / "gpu.json"))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"]["correct: SimCLR gradient by chunks"] == "ValueError: broken"
    assert "cross-entropy gradient fp16" in found["correct"]
