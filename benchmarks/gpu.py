"""All GPU speed and memory measurements in eight minutes, beside plain loops in the same run.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --only steps generation --before gpu-old.json
    python benchmarks/gpu.py --only steps --systems GLoRIA
    python benchmarks/gpu.py --device cpu --tiny

Sections: device peaks; correctness of gradients; source lines at which a training step waits for
the device; losses alone; generation; weight updates; training steps of the five systems at their
published sizes; image loading; compiled steps. Each section has a time budget: measurements that do
not fit, or that this version or machine does not support, are listed under `skipped`, errors under
`failed`. The file is written after every measurement, so an interrupted run loses nothing.
Milliseconds are those of a step within a series, kernels and memory those of a single step. Matrix
products are `ieee` (full float32), `tf32` or `bf16`, the last two with cuDNN's benchmark mode; `as
set` is the default of a float32 training, with the published optimizer. `share` is the fraction of
the product peak measured here in the same arithmetic. With `--before`, a table compares the results
with those of an older file. The last line printed is one JSON object: the geometric mean over the
systems of samples per second in bfloat16, ours and the plain loops'.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import gpu_losses, gpu_sections
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_timing import Device
from benchmarks.published_systems import PUBLISHED, SYSTEMS, TINY, Lacking, Systems

SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "peaks": (gpu_sections.peaks, 15),
    "correct": (gpu_sections.correct, 30),
    "stalls": (gpu_sections.stalls, 45),
    "losses": (gpu_losses.losses, 50),
    "generation": (gpu_sections.generation, 50),
    "update": (gpu_sections.update, 20),
    "steps": (gpu_sections.steps, 160),
    "loader": (gpu_sections.loader, 40),
    "compiled": (gpu_sections.compiled, 70),
}
"""Each with its time budget in seconds; unused time goes to the next."""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write all results to this file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--before", type=Path, help="results of an older run, to compare with")
    parser.add_argument("--tiny", action="store_true", help="small networks, for a trial run")
    return parser.parse_args()


def about(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    import torchvision
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, section by section."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    found: dict[str, Any] = {"about": about(device), "seconds": {}, "skipped": {}, "failed": {}}
    print(json.dumps(found["about"]), flush=True)

    def write() -> None:
        if arguments.out is not None:
            partial = arguments.out.with_name(f"{arguments.out.name}.partial")
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            partial.replace(arguments.out)

    with tempfile.TemporaryDirectory() as folder:
        systems = Systems(TINY if arguments.tiny else PUBLISHED, Path(folder), device)
        timing = Device(device, 0 if arguments.tiny else 0.6)
        bench = Bench(timing, systems, found, write, arguments.tiny, tuple(arguments.systems))
        bench.deadline = time.perf_counter()
        for name in arguments.only or SECTIONS:
            section, seconds = SECTIONS[name]
            bench.start(name, seconds)
            began = time.perf_counter()
            try:
                section(bench)
            except Lacking as lack:
                found["skipped"][name] = str(lack)
            except Exception as error:
                # For example a package that is not installed: the other sections still run.
                bench.failed("all of it", error)
            found["seconds"][name] = round(time.perf_counter() - began, 1)
            print(f"{name}: {found['seconds'][name]} s", flush=True)
            timing.release()
            write()
    return found


def table(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Results in both files, as lines of a Markdown table."""
    lines = ["| figure | before | now | now / before |", "|---|---|---|---|"]
    old, new = _flat(before), _flat(after)
    for key in new:
        if key in old:
            ratio = f"{new[key] / old[key]:.2f}" if old[key] else ""
            lines.append(f"| {key} | {old[key]:g} | {new[key]:g} | {ratio} |")
    return lines


def _flat(found: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in found.items():
        if isinstance(value, dict) and key not in ("about", "seconds", "skipped", "failed"):
            flat |= _flat(value, f"{prefix}{key}: ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The last line."""
    steps = found.get("steps", {})
    pairs = []
    for key, row in steps.items():
        plain = steps.get(f"{key} plain")
        if key.endswith(" bf16") and plain:
            pairs.append((row["samples_s"], plain["samples_s"]))
    result: dict[str, Any] = {"name": "gpu", "ours": None, "peer": None, "unit": "samples/s"}
    result["ratio"] = None
    if pairs:
        ours, peer = (
            math.exp(sum(map(math.log, side)) / len(side)) for side in zip(*pairs, strict=True)
        )
        result |= {"ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ours / peer, 2)}
    return result


def main() -> None:
    """Measure, compare and print."""
    arguments = parse_arguments()
    before = json.loads(arguments.before.read_text()) if arguments.before else None
    found = run(arguments)
    for kind in ("skipped", "failed"):
        for name, reason in found[kind].items():
            print(f"{kind}: {name}: {reason}")
    if before is not None:
        print("\n".join(table(before, found)))
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
