"""What is done to the repeated blocks of a network: compile them, or compute them twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a network that follow on each other: residual blocks, transformer layers.

    These are the members of the outermost `Sequential` and `ModuleList` containers of at least
    two members with parameters; containers inside a block are part of the block.
    """
    found: list[nn.Module] = []
    for child in model.children():
        members = [m for m in child.children() if any(True for _ in m.parameters())]
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(members) > 1:
            found += members
        else:
            found += repeated_blocks(child)
    return found


def compile_blocks(model: nn.Module) -> int:
    """Let torch compile each block, in place; returns how many there are.

    Blocks rather than the whole: equal ones are compiled once, and what lies between them may do
    as it likes. The names of parameters stay.
    """
    import torch._dynamo  # takes a second, which other runs need not wait

    blocks = repeated_blocks(model)
    # Each width of a residual network and each length of report counts as a compilation.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward)
    return len(blocks)


def checkpoint_blocks(model: nn.Module) -> int:
    """Keep the input of each block instead of all that is inside, in place; returns how many.

    What the backward pass needs is computed once more, with the same random numbers (Chen et al.
    2016, arXiv 1604.06174). Running statistics are updated the first time only.
    """
    blocks = repeated_blocks(model)
    for block in blocks:
        block.forward = partial(_computed_twice, block, block.forward)
    return len(blocks)


def _computed_twice(block: nn.Module, forward: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    if not (torch.is_grad_enabled() and block.training):
        return forward(*args, **kw)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _buffers_kept(block)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kw)


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    values = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(block.buffers(), values, strict=True):
            buffer.data.copy_(value)
