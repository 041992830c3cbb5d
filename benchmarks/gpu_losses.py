"""Section of `benchmarks/gpu.py`: the slow parts of losses, measured alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_bench import Bench, Row, needs_gpu, products, relative
from benchmarks.published_systems import Lacking
from tests.losses.reference import local_loss_report_by_report
from vilmedic.blocks.autoencoder import relaxed_lookup
from vilmedic.device import autocast
from vilmedic.losses.gloria import gloria_local_loss
from vilmedic.losses.linear_cross_entropy import linear_cross_entropy


def losses(bench: Bench) -> None:
    """The slow parts of losses alone, forward and backward."""
    _local_loss(bench)
    _codebook(bench)
    _cross_entropy(bench)


def _local_loss(bench: Bench) -> None:
    pairs, words, grid, width = (4, 9, 4, 32) if bench.tiny else (48, 97, 19, 768)
    random = torch.Generator().manual_seed(0)
    regions = torch.randn(pairs, width, grid, grid, generator=random).bfloat16()
    reports = (0.2 * torch.randn(pairs, words, width, generator=random)).bfloat16()
    lengths = torch.randint(words // 4, words + 1, (pairs,), generator=random)
    lengths[0] = words
    mask = (torch.arange(words) < lengths[:, None]).to(bench.device)
    right: list[Tensor] = []

    def ours(one: Tensor, other: Tensor) -> Tensor:
        terms = gloria_local_loss(one, other, mask, temp1=4.0, temp2=5.0, temp3=10.0)
        return terms[0] + terms[1]

    def peer(one: Tensor, other: Tensor) -> Tensor:
        return local_loss_report_by_report(one, other, lengths.tolist())

    def measure(loss: Callable[..., Tensor], kind: str, dtype: torch.dtype) -> Row:
        needs_gpu(bench, kind)
        given = [v.to(bench.device, dtype).requires_grad_() for v in (regions, reports)]

        def step() -> None:
            for value in given:
                value.grad = None
            loss(*given).backward()

        with products(kind), autocast(bench.device, "bf16" if kind == "bf16" else "fp32"):
            row: Row = {} if kind == "float64" else bench.timing.time(step)
            row |= bench.timing.peak(step) | bench.kernels(step)
        gradients = [value.grad.double() for value in given if value.grad is not None]
        if kind == "float64":
            right[:] = gradients
        else:
            names = ("regions_error", "words_error")
            row |= dict(zip(names, map(relative, gradients, right), strict=True))
        return row

    bench.row("local right", lambda: measure(peer, "float64", torch.float64))
    for kind in ("ieee", "tf32", "bf16"):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        bench.row(f"local {kind}", lambda k=kind, d=dtype: measure(ours, k, d))
        bench.row(f"local {kind} report by report", lambda k=kind, d=dtype: measure(peer, k, d))


def _codebook(bench: Bench) -> None:
    positions, hidden, codes, width = (64, 8, 32, 8) if bench.tiny else (16_384, 64, 8192, 1024)
    random = torch.Generator().manual_seed(0)
    shapes = ((positions, hidden), (codes, hidden), (codes,), (codes, width))
    given = [torch.randn(s, generator=random).to(bench.device).requires_grad_() for s in shapes]

    def measure(precision: str) -> Row:
        def step() -> None:
            for value in given:
                value.grad = None
            with autocast(bench.device, precision):
                vectors, _ = relaxed_lookup(*given, temperature=0.9)
            vectors.float().square().mean().backward()

        with products("ieee"):
            return bench.timing.time(step) | bench.timing.peak(step) | bench.kernels(step)

    for precision in ("fp32", "bf16"):
        bench.row(f"codebook {precision}", lambda p=precision: measure(p))


def _cross_entropy(bench: Bench) -> None:
    rows, width, classes = (64, 16, 32) if bench.tiny else (12_288, 1024, 8192)
    random = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        (scale * torch.randn(shape, generator=random)).to(bench.device).requires_grad_()
        for scale, shape in ((1.0, (rows, width)), (0.02, (classes, width)), (0.0, (classes,)))
    )
    targets = torch.randint(classes, (rows,), generator=random).to(bench.device)

    def plain(*given: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(*given).float(), targets)

    def ours(*given: Tensor) -> Tensor:
        return linear_cross_entropy(given[0], given[1], given[2], targets)

    def of_torch(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        function: Any = getattr(functional, "linear_cross_entropy", None)
        if function is None:
            raise Lacking("this torch has no functional.linear_cross_entropy")
        loss: Tensor = function(hidden, weight, targets, linear_bias=bias)
        return loss

    def measure(loss: Callable[..., Tensor], precision: str) -> Row:
        def step() -> None:
            hidden.grad = weight.grad = bias.grad = None
            with autocast(bench.device, precision):
                value = loss(hidden, weight, bias)
            value.backward()

        with products("ieee"):
            row = bench.timing.time(step) | bench.timing.peak(step)
            return row | bench.kernels(step)

    for precision in ("fp32", "bf16"):
        bench.row(f"cross-entropy {precision}", lambda p=precision: measure(ours, p))
        bench.row(f"cross-entropy {precision} plain", lambda p=precision: measure(plain, p))
        bench.row(f"cross-entropy {precision} of torch", lambda p=precision: measure(of_torch, p))
    fused = plain if bench.tiny else torch.compile(plain)
    bench.row("cross-entropy bf16 plain compiled", lambda: measure(fused, "bf16"))
