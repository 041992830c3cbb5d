"""Memory predicted by `bin/train.py --plan`, against that of training steps on a CPU.

    python benchmarks/plan.py

For each configuration, by default the five phantom ones, one process predicts, and another runs two
real steps on batches of the same shapes, the longest reports included. Memory is the peak allocated
by torch in the second step, as `torch.cuda.max_memory_allocated` is on a GPU; the growth of the
process is printed beside it. The last line printed is one JSON object for the configuration with
the worst prediction: `ours` is predicted, `peer` measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.peak_memory import MIB, read_peak, start_peak
from vilmedic.config.load import load
from vilmedic.training.fake_run import CPU, FakeTraining
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.plan import MadeUp
from vilmedic.training.step import TrainingStep

ROOT = Path(__file__).resolve().parents[1]
PHANTOM = ("convirt", "simclr", "gloria", "vae", "dalle")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--configs", nargs="+", default=[f"phantom/{name}.yml" for name in PHANTOM])
    parser.add_argument("--keys", nargs="*", default=[], help="key=value for all runs")
    parser.add_argument("--of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def predicted(made_up: MadeUp) -> dict[str, float]:
    """Predicted MiB of a step, without running it."""
    training = FakeTraining(made_up.model, made_up.data.prepare, made_up.section, gpu=False)
    step = training.step(made_up.group(made_up.section.batch_size))
    return {"mib": step.peak / MIB} | {part: size / MIB for part, size in step.held.items()}


def measured(made_up: MadeUp) -> dict[str, float]:
    """Measured MiB of a real step."""
    section, model = made_up.section, made_up.model.train()
    optimizer = make_optimizer(model, section)
    step = TrainingStep(model, made_up.data.prepare, optimizer, section, CPU)
    group = [
        {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for batch in made_up.group(section.batch_size)
    ]
    before = start_peak(CPU)
    step(group)
    grown = read_peak(CPU) - before
    # The trace does not see the release of tensors that were allocated before it started.
    model.zero_grad(set_to_none=True)
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step(group)
    results: Any = trace.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = peak = held
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return {"mib": peak / MIB, "process_grown_mib": grown}


def in_process(arguments: argparse.Namespace, kind: str, config: str) -> dict[str, float]:
    """Predict or measure in a separate process."""
    command = [sys.executable, __file__, "--keys", *arguments.keys, "--of", kind, config]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure all and print the comparison."""
    arguments = parse_arguments()
    if arguments.of:
        kind, name = arguments.of
        config = load(ROOT / "config" / name, arguments.keys, training=True)
        with tempfile.TemporaryDirectory() as folder:
            made_up = MadeUp(config, Path(folder))
            print(json.dumps(predicted(made_up) if kind == "ours" else measured(made_up)))
        return
    worst: dict[str, Any] = {}
    for config in arguments.configs:
        ours, peer = (in_process(arguments, kind, config) for kind in ("ours", "peer"))
        ratio = ours["mib"] / peer["mib"]
        print(
            f"{config:24s} predicted {ours['mib']:7.1f} MiB, measured {peer['mib']:7.1f}: "
            f"{ratio - 1:+.1%}; the process grew by {peer['process_grown_mib']:.1f} MiB",
            flush=True,
        )
        if not worst or abs(ratio - 1) > abs(worst["ratio"] - 1):
            worst = {
                "name": f"plan {config}",
                "ours": round(ours["mib"], 1),
                "peer": round(peer["mib"], 1),
                "unit": "MiB",
                "ratio": round(ratio, 3),
            }
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
