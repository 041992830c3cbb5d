"""Sections of `benchmarks/gpu.py`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.gpu_bench import Bench, Row, needs_gpu, our_products, products, relative
from benchmarks.gpu_timing import flop
from benchmarks.plain_steps import plain_step
from benchmarks.published_systems import (
    CONTRASTIVE,
    PUBLISHED_OPTIMIZER,
    Batch,
    Lacking,
    our_step,
    trainor_section,
)
from tests.parity.reference import load_reference, missing_packages
from vilmedic.datasets.loader import make_loader
from vilmedic.device import autocast, move
from vilmedic.losses.linear_cross_entropy import linear_cross_entropy
from vilmedic.training.averaged_weights import AveragedWeights
from vilmedic.training.optimization import make_optimizer


def peaks(bench: Bench) -> None:
    """Peak rates of the device: matrix products, a copy, a kernel launch."""
    device, timing = bench.device, bench.timing
    size = 256 if bench.tiny else 8192 if timing.cuda else 2048

    def product(dtype: torch.dtype, kind: str) -> Row:
        needs_gpu(bench, kind)
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        with products(kind):
            took = timing.time(lambda: one @ other)["ms"]
        return {"tflops": round(2 * size**3 / took / 1e9, 3)}

    bench.row("bf16", lambda: product(torch.bfloat16, "ieee"))
    bench.row("tf32", lambda: product(torch.float32, "tf32"))
    bench.row("ieee", lambda: product(torch.float32, "ieee"))

    def copy() -> Row:
        source = torch.empty(2**20 if bench.tiny else 2**30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        took = timing.time(lambda: target.copy_(source))["ms"]
        return {"read_and_written_gb_s": round(2 * source.numel() / took / 1e6, 1)}

    def launch() -> Row:
        value = torch.zeros(1, device=device)
        took = timing.time(lambda: [value.add_(1) for _ in range(1000)])
        return {"us": took["ms"], "queue_us": took["queue_ms"]}

    bench.row("copy", copy)
    bench.row("launch", launch)


def correct(bench: Bench) -> None:
    """Errors of gradients computed in chunks, and of the cross-entropy in 16 bits."""
    for name in [name for name in bench.names if name in CONTRASTIVE]:
        bench.row(f"{name} gradient by chunks", lambda n=name: _chunk_error(bench, n))
    rows, width, classes = (256, 16, 64) if bench.tiny else (12_288, 256, 8192)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=random).to(bench.device)
    weight = (0.02 * torch.randn(classes, width, generator=random)).to(bench.device)
    targets = torch.randint(classes, (rows,), generator=random).to(bench.device)
    bias = torch.zeros(classes, device=bench.device)
    wide = [value.double().requires_grad_() for value in (hidden, weight, bias)]
    functional.cross_entropy(functional.linear(*wide), targets).backward()

    def error(precision: str, scale: float) -> Row:
        given = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
        with autocast(bench.device, precision), products("ieee"):
            loss = linear_cross_entropy(given[0], given[1], given[2], targets)
            (loss * scale).backward()
        names = ("hidden", "weight", "bias")
        return {
            name: relative(ours.grad.double() / scale, right.grad)
            for name, ours, right in zip(names, given, wide, strict=True)
        }

    for precision, scale in (("fp32", 1.0), ("bf16", 1.0), ("fp16", 65_536.0)):
        bench.row(f"cross-entropy gradient {precision}", lambda p=precision, s=scale: error(p, s))


def _chunk_error(bench: Bench, name: str) -> Row:
    """Difference of the gradients with and without the graphs of all chunks, dropout on."""
    from vilmedic.models.constant_memory import join

    size = 4 if bench.tiny else 8
    batch = move(bench.systems.batch(name, size), bench.device)
    prepare = bench.systems.prepare(name)
    gradients = []
    with products("ieee"):
        for kept in (True, False):
            model = bench.systems.model(name, chunk=size // 2).to(bench.device).train()
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
            torch.manual_seed(3)
            if kept:
                features = join([model.encode(prepare(part)) for part in model.chunks(batch)])
                loss = model.contrast(features)["loss"]
            else:
                loss = model(batch, prepare)["loss"]
            loss.backward()
            gradients.append(
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            )
    return {"relative_error": relative(gradients[1], gradients[0])}


def stalls(bench: Bench) -> None:
    """Lines at which a training step waits for the device."""
    optimizers: dict[str, Row] = {"AdamW": {}, "RAdam": {}, "SGD": {"momentum": 0.9}}
    for name in bench.names:
        size = bench.systems.sizes.batch[name]
        batch, prepare = bench.systems.batch(name, size), bench.systems.prepare(name)
        for optimizer, options in optimizers.items():
            for chunk in (None, max(1, size // 2)) if optimizer == "AdamW" else (None,):
                if chunk is not None and name not in CONTRASTIVE:
                    continue

                def measure(optimizer: str = optimizer, options: Row = options, chunk=chunk) -> Row:  # type: ignore[no-untyped-def]
                    model = bench.systems.model(name, chunk)  # noqa: B023
                    step = our_step(
                        model,
                        prepare,  # noqa: B023
                        bench.device,
                        optimizer=optimizer,
                        precision="bf16",
                        optim_params=options,
                    )
                    for _ in range(2):
                        step(batch)  # noqa: B023
                    lines = bench.timing.stalls(lambda: step(batch))  # noqa: B023
                    return {"waits": sum(lines.values()), "lines": lines}

                bench.row(f"{name} {optimizer}{' in chunks' if chunk else ''}", measure)


def generation(bench: Bench) -> None:
    """Milliseconds per token, and a checksum of the float32 tokens, which must not change."""
    from vilmedic.generation import sampling as ours

    model = bench.systems.model("DALLE").to(bench.device).eval()
    batch = bench.systems.batch("DALLE", 16)
    length = min(model.image_seq_len, 256)
    random = torch.Generator().manual_seed(0)
    draws = torch.rand(16, length, generator=random, dtype=torch.float64).to(bench.device)
    ids, mask = (batch[key].to(bench.device) for key in ("input_ids", "attention_mask"))

    def measure(images: int, kind: str, guided: bool) -> Row:
        needs_gpu(bench, kind)
        precision = "bf16" if kind == "bf16" else "fp32"
        sampling = ours.Sampling(filter_thres=0.9, cond_scale=3.0 if guided else 1.0)
        given = (ids[:images], mask[:images])
        with ExitStack() as kept:
            kept.enter_context(our_products(bench, kind))
            if hasattr(ours, "TokenDrawing"):
                drawing = ours.TokenDrawing([model], sampling, precision=precision)
                kept.enter_context(drawing)

                def make(tokens: int) -> Tensor:
                    return drawing(*given, draws[:images, :tokens])
            else:
                kept.enter_context(autocast(bench.device, precision))

                def make(tokens: int) -> Tensor:
                    return ours.generate_tokens([model], *given, draws[:images, :tokens], sampling)

            tokens = make(length)
            took = bench.timing.time(lambda: make(length), warm=0)["ms"]
            row: Row = {"ms_a_token": round(took / length, 4)}
            row |= bench.timing.peak(lambda: make(length))
            few, many = (bench.kernels(lambda n=n: make(n)) for n in (4, 12))  # type: ignore[misc]
        if few and many:
            row["kernels_a_token"] = (many["kernels"] - few["kernels"]) / 8
        if kind == "ieee":
            digest = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
            row["tokens"] = digest[:16]
        return row

    for images in (1, 5, 16):
        for kind in ("ieee", "tf32", "bf16"):
            bench.row(f"{images} images {kind}", lambda i=images, k=kind: measure(i, k, False))
    bench.row("5 images bf16 guided", lambda: measure(5, "bf16", True))
    for precision in ("fp32", "bf16"):
        key = f"5 images {precision} dalle-pytorch, its cache handed on"
        bench.row(key, lambda p=precision: _peer_generation(bench, batch, p))


def _peer_generation(bench: Bench, batch: Batch, precision: str) -> Row:
    if missing := missing_packages():
        raise Lacking(f"{', '.join(missing)}: not installed")
    from benchmarks.dalle_generate import cached_images

    reference, sizes = load_reference(), bench.systems.sizes
    vae = reference.DiscreteVAE(**sizes.vae)
    model = reference.DALLE(vae=vae, **sizes.dalle).to(bench.device).eval()
    longest = sizes.dalle["text_seq_len"]
    reports = functional.pad(batch["input_ids"][:5], (0, longest - batch["input_ids"].shape[1]))
    model.vae.decode = lambda tokens: tokens  # tokens only, as in ours
    length = min(sizes.image_tokens, 64)
    with autocast(bench.device, precision):
        took = bench.timing.time(
            lambda: cached_images(model, reference, reports.to(bench.device), 0.9, length), warm=1
        )["ms"]
    return {"ms_a_token": round(took / length, 4)}


def update(bench: Bench) -> None:
    """Updates after the backward pass: optimizers and averaged weights."""
    model = bench.systems.model("ConVIRT").to(bench.device).train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    taken = torch.ones((), dtype=torch.bool, device=bench.device)

    def measure(step: Callable[[], object]) -> Row:
        row: Row = bench.timing.time(step)
        return row | bench.kernels(step)

    def averaged() -> Row:
        average = AveragedWeights(model, 0.999)
        return measure(lambda: average.update(10, taken))

    bench.row("average", averaged)
    for name, options in (("AdamW", {}), ("Adam", {}), ("RAdam", {}), ("SGD", {"momentum": 0.9})):

        def stepped(name: str = name, options: Row = options) -> Row:
            section = trainor_section(optimizer=name, optim_params=options)
            return measure(make_optimizer(model, section).step)

        bench.row(name, stepped)


def steps(bench: Bench) -> None:
    """Training steps at the published batch and a larger one, beside plain loops."""
    sizes = bench.systems.sizes
    for name in bench.names:
        size = sizes.batch[name]
        key, published = f"{name} {size}", {"optimizer": PUBLISHED_OPTIMIZER[name]}
        ours: dict[str, tuple[str, Row]] = {
            "as set": ("as set", published),
            "ieee": ("ieee", {}),
            "tf32": ("tf32", {}),
            "bf16": ("bf16", {"precision": "bf16"}),
            "bf16 checkpointed": (
                "bf16",
                {"precision": "bf16", "activation_checkpointing": True},
            ),
        }
        for label, (kind, options) in ours.items():
            bench.row(
                f"{key} {label}", lambda n=name, s=size, k=kind, o=options: _ours(bench, n, s, k, o)
            )
        for kind in ("ieee", "tf32", "bf16"):
            bench.row(f"{key} {kind} plain", lambda n=name, s=size, k=kind: _plain(bench, n, s, k))
    for name, size in sizes.large.items():
        if name not in bench.names:
            continue
        options = {"precision": "bf16"}
        bench.row(
            f"{name} {size} bf16", lambda n=name, s=size, o=options: _ours(bench, n, s, "bf16", o)
        )
        bench.row(f"{name} {size} bf16 plain", lambda n=name, s=size: _plain(bench, n, s, "bf16"))


def _ours(bench: Bench, name: str, size: int, kind: str, options: Row) -> Row:
    needs_gpu(bench, kind)
    options = {"optimizer": "AdamW"} | options
    step = our_step(bench.systems.model(name), bench.systems.prepare(name), bench.device, **options)
    batch = bench.systems.batch(name, size)
    what = name + " checkpointed" * ("activation_checkpointing" in options)
    with our_products(bench, "bf16" if kind == "compiled" else kind):
        return _step_row(bench, lambda: step(batch), what, size, kind)


def _plain(bench: Bench, name: str, size: int, kind: str) -> Row:
    needs_gpu(bench, kind)
    precision = "bf16" if kind == "bf16" else "fp32"
    step = plain_step(name, bench.systems.sizes, bench.device, precision)
    batch = bench.systems.batch(name, size)
    with products(kind):
        return _step_row(bench, lambda: step(batch), f"{name} plain", size, kind)


def _step_row(bench: Bench, step: Callable[[], object], what: str, size: int, kind: str) -> Row:
    """Measure a step.

    Args:
        bench: shared state.
        step: a step on a batch of `size`.
        what: name of the computation; its operations are counted once for all precisions.
        size: samples of the batch.
        kind: matrix product mode, or `as set` or `compiled`.
    """
    row: Row = bench.timing.time(step, warm=3)
    row = {"samples_s": round(size / row["ms"] * 1e3, 2), **row} | bench.timing.peak(step)
    if kind == "compiled":  # counting would compile again
        return row | bench.kernels(step)
    if (what, size) not in bench.operations:
        bench.operations[what, size] = flop(step)
    done = bench.operations[what, size]
    row["tflop"] = float(f"{done / 1e12:.4g}")
    peak = bench.found.get("peaks", {}).get("bf16" if kind == "bf16" else kind)
    if peak:
        row["share"] = float(f"{done / row['ms'] / 1e9 / peak['tflops']:.3g}")
    if kind in ("as set", "bf16"):
        row |= bench.kernels(step)
    return row


def compiled(bench: Bench) -> None:
    """Steps in bfloat16 with `trainor.compile`, and the total seconds with compilation.

    Tiny models are not compiled.
    """
    if bench.tiny:
        torch.compiler.set_stance("force_eager")
    for name in bench.names:
        size = bench.systems.sizes.batch[name]
        options = {"precision": "bf16", "compile": True}

        def measure(name: str = name, size: int = size, options: Row = options) -> Row:
            began = time.perf_counter()
            row = _ours(bench, name, size, "compiled", options)
            row["with_compiling_s"] = round(time.perf_counter() - began, 1)
            return row

        bench.row(f"{name} {size} bf16", measure)


def loader(bench: Bench) -> None:
    """Images per second on the device, augmented and normalised, from JPEG or PNG files.

    Measured with the default number of workers and with one per core.
    """
    cores = len(os.sched_getaffinity(0))
    pixels = bench.systems.sizes.pixels
    settings: Row = {"resize": pixels * 8 // 7, "crop": pixels}
    for name, preset in (
        ("ConVIRT", "resize_crop"),
        ("ConVIRT", "convirt"),
        ("SimCLR", "simclr_xray"),
    ):
        if name not in bench.names:
            continue
        data = bench.systems.images(name, preset=preset, **settings)
        for workers in (1,) if bench.tiny else (None, cores):

            def measure(data: Any = data, workers: int | None = workers) -> Row:
                size = min(32, len(data))
                load = make_loader(
                    data,
                    batch_size=size,
                    training=True,
                    seed=0,
                    drop_last=True,
                    num_workers=workers,
                )
                began = images = epoch = 0
                while epoch < 2 or time.perf_counter() - began < 4 * bench.timing.seconds:
                    load.set_epoch(epoch)
                    for batch in load:
                        done = data.prepare(move(batch, bench.device))
                        images += done["images"].shape[:-3].numel() if epoch else 0
                    epoch += 1
                    if epoch == 1:  # the workers have started
                        bench.timing.wait()
                        began = time.perf_counter()
                bench.timing.wait()
                took = time.perf_counter() - began
                load.close()
                return {"images_s": round(images / took, 1)}

            bench.row(f"{preset} {workers or 'default'} workers", measure)
