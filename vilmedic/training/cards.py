"""GPU specifications by name: memory, arithmetic and bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

REACHED = 0.6
"""Share of the rate of products that the products of a training step reach, large and small."""
MOVED = 0.5
"""Share of the rate of memory that all other operations reach."""
LAUNCH = 25e-6
"""Seconds that the CPU takes to queue an operation: what a step of small operations waits for. The
host of an H200 took 28 to 50 in the steps of benchmarks/gpu.py; others are faster."""
USABLE = 0.92
"""Share of the memory for tensors; CUDA, its libraries and gaps between tensors take the rest."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Args:
        memory: GiB.
        half: TFLOP/s of dense products in bfloat16, or in float16 where there is no bfloat16.
        tf32: the same of float32 inputs rounded to 19 bits, as training does by itself.
        fp32: the same of float32.
        bandwidth: GB/s of its memory.
        bf16: whether it computes in bfloat16.
    """

    memory: float
    half: float
    tf32: float
    fp32: float
    bandwidth: float
    bf16: bool = True

    def rate(self, dtype: torch.dtype, *, tf32: bool) -> float:
        """Floating-point operations a second of products of a type of number."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.half * 1e12
        return (self.tf32 if tf32 else self.fp32) * 1e12


CARDS = {
    "t4": Card(16, 65, 8.1, 8.1, 320, bf16=False),
    "v100": Card(32, 125, 15.7, 15.7, 900, bf16=False),
    "a10": Card(24, 125, 62.5, 31.2, 600),
    "l4": Card(24, 121, 60, 30.3, 300),
    "rtx3090": Card(24, 71, 35.6, 35.6, 936),
    "rtx4090": Card(24, 165, 82.6, 82.6, 1008),
    "l40s": Card(48, 362, 183, 91.6, 864),
    "a100-40": Card(40, 312, 156, 19.5, 1555),
    "a100": Card(80, 312, 156, 19.5, 2039),
    "h100": Card(80, 989, 494, 67, 3350),
    "h200": Card(141, 989, 494, 67, 4800),
}
