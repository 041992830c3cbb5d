"""Bytes that processes exchange in a training step: formulas, and counts in two processes."""

from __future__ import annotations

import os
import socket
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.systems import build, make_batches, parts_of, train
from tests.several_processes import run_checks
from vilmedic.files import text_table
from vilmedic.models.contract import Model

BYTES = 4
TCP_INFO = 11
BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info


@dataclass(frozen=True)
class Costs:
    """What a system exchanges.

    Args:
        parameters: number of trained parameters.
        floats: floats for each sample that all processes gather, with gradients sent back.
        fixed: bytes for each sample that are gathered without a gradient.
        swapped: floats for each sample that each process sends to the owner of the sample.
        scalars: numbers that are averaged for the log.
        blocks: parameters in repeated blocks, which `fsdp` gathers in the forward and in the
            backward pass; it gathers the others once.
    """

    parameters: int
    floats: int
    fixed: int = 0
    swapped: int = 0
    scalars: int = 1
    blocks: int = 0


def sent(costs: Costs, batch: int, world: int, *, parallel: str, ring: bool) -> dict[str, float]:
    """Bytes that a process sends in a step without accumulation, by kind.

    Args:
        costs: what the system exchanges.
        batch: samples of all processes together.
        world: number of processes.
        parallel: `ddp` or `fsdp`.
        ring: whether reduce-scatter sends each part once, as NCCL does; gloo runs a whole
            all-reduce.
    """
    others = (world - 1) / world
    scatter = others if ring else 2 * others
    gradients = 2 * others * costs.parameters
    if parallel == "fsdp":
        gradients = (others + scatter) * costs.parameters + others * costs.blocks
    features = BYTES * costs.floats * batch
    return {
        "gradients": BYTES * gradients,
        "features": features * (others + scatter) + costs.fixed * batch * others,
        # Forward and backward: each process sends the others' share of its values.
        "swapped": 2 * BYTES * costs.swapped * batch * others,
        "scalars": 2 * BYTES * costs.scalars * others,
    }


def costs_of(model: Model, floats: int, **more: int) -> Costs:
    """The costs of a model, given the floats for each sample."""
    blocks = sum(map(_trained, model.repeated_blocks()))
    return Costs(_trained(model), floats, blocks=blocks, **more)


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# The check: bytes that two processes send


def sent_by_this_process() -> int:
    """Bytes that the kernel has sent on the TCP connections of this process."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    info = one.getsockopt(socket.IPPROTO_TCP, TCP_INFO, BYTES_SENT + 8)
                    total += struct.unpack_from("=Q", info, BYTES_SENT)[0]
        except OSError:
            continue
    return total


def count(system: str, parallel: str, batches: tuple[int, ...] = (64, 256)) -> dict[str, Any]:
    """Bytes of one step at each batch size, counted and from the formulas."""
    result: dict[str, Any] = {}
    for batch in batches:
        # Wide enough that control messages between the processes do not matter.
        model = build(system, **({"hidden": 20_000} if system == "Autoencoder" else {}))
        floats, more = gathered_by(system, model)
        costs = costs_of(model, floats, **more)
        data = make_batches(system, [batch])
        step, _ = train(model, data, parallel=parallel)
        own, parts = parts_of(data)
        step(own, parts)
        before, steps = sent_by_this_process(), 3
        for _ in range(steps):
            step(own, parts)
        counted = (sent_by_this_process() - before) / steps
        formula = sum(sent(costs, batch, 2, parallel=parallel, ring=False).values())
        result[str(batch)] = {"counted": counted, "formula": formula}
    return result


def gathered_by(system: str, model: Any) -> tuple[int, dict[str, int]]:
    """Floats for each sample of the small models, and what else they exchange."""
    if system == "ConVIRT":
        return 2 * 8, {"scalars": 3}
    if system == "SimCLR":
        return 2 * 8, {}
    if system == "GLoRIA":
        return 2 * 16 + 16 * 16, {"fixed": 16, "swapped": 1, "scalars": 5}
    return 0, {"scalars": 2}


def count_all() -> dict[str, Any]:
    """Return the results of `count` for every system, by its name and parallel mode."""
    return {
        f"{system} {parallel}": count(system, parallel)
        for system in ("ConVIRT", "SimCLR", "GLoRIA", "Autoencoder")
        for parallel in ("ddp", "fsdp")
    }


def check() -> float:
    """Print counted bytes beside the formulas; return the largest relative error."""
    with tempfile.TemporaryDirectory() as folder:
        per_process = run_checks([count_all], Path(folder), seconds=1800)["count_all"]
    for result in per_process:
        if isinstance(result, str):
            raise RuntimeError(result)
    worst = 0.0
    print("Bytes that one of two processes sends in a step (gloo)\n")
    rows = [["", "batch", "counted", "formula", "error"]]
    for name, batches in per_process[0].items():
        for batch in batches:
            # The two processes do not relay the same; the formulas give their mean.
            values = [one[name][batch] for one in per_process]
            counted = sum(value["counted"] for value in values) / len(values)
            formula = values[0]["formula"]
            error = abs(counted - formula) / formula
            worst = max(worst, error)
            rows.append([name, batch, f"{counted:,.0f}", f"{formula:,.0f}", f"{error:.2%}"])
    print(*text_table(rows), sep="\n")
    return worst
