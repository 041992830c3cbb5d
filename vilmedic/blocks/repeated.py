"""Layers and repeated blocks of a network: compilation and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vilmedic.errors import ArgumentError
from vilmedic.log import counted

EMBEDDING, HEAD = "embedding", "head"


@dataclass
class Layer:
    """A part of a network that follows on another one.

    Args:
        name: the name of the block in the network, `embedding` or `head`.
        parameters: by their names in the network.
        modules: the modules of the layer, which may have to stay in evaluation mode.
    """

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list)


def layers_of(network: nn.Module, blocks: Sequence[nn.Module] | None = None) -> list[Layer]:
    """Return the layers of a network in order: embedding, blocks, head.

    The embedding is everything before the first block, including token and position embeddings;
    the head is everything after the last one, such as a final normalisation. Modules between two
    blocks belong to the block before them. A network without blocks is one layer, the embedding.
    Every parameter is in one layer, a shared one in the layer where it comes first.

    Args:
        network: a network.
        blocks: its blocks in order; None takes its repeated blocks.

    Returns:
        Layers with at least one parameter.
    """
    blocks = repeated_blocks(network) if blocks is None else blocks
    names = {id(module): name for name, module in network.named_modules()}
    layers = [Layer(EMBEDDING), *(Layer(names[id(block)]) for block in blocks), Layer(HEAD)]
    place = {id(one): at for at, block in enumerate(blocks, start=1) for one in block.modules()}
    around = {""}  # the names of the modules that contain blocks
    for layer in layers[1:-1]:
        around |= {layer.name[:at] for at, letter in enumerate(layer.name) if letter == "."}
    seen: set[int] = set()
    current = 0
    for prefix, module in network.named_modules():
        if id(module) in place:
            current = place[id(module)]
        elif blocks and current == len(blocks) and prefix not in around:
            current = len(blocks) + 1
        layer = layers[current]
        if prefix not in around:
            layer.modules.append(module)
        for name, value in module.named_parameters(prefix, recurse=False):
            if id(value) not in seen:
                seen.add(id(value))
                layer.parameters[name] = value
    return [layer for layer in layers if layer.parameters]


def freeze_first(layers: Sequence[Layer], count: int, what: str) -> list[nn.Module]:
    """Freeze the embedding and the first blocks of a network.

    Args:
        layers: the layers of the network in order.
        count: number of blocks.
        what: the network, for messages.

    Returns:
        The modules that have to stay in evaluation, so that batch statistics stay as they are.

    Raises:
        ConfigError: the network has fewer blocks.
    """
    blocks = [layer for layer in layers if layer.name not in (EMBEDDING, HEAD)]
    if count > len(blocks):
        raise ArgumentError(
            {
                "freeze": f"given {count}, but {what} has "
                f"{counted(len(blocks), 'layer')} in a row. Allowed: true, "
                f"false{f', or 1 to {len(blocks)}' if blocks else ''}."
            }
        )
    last = layers.index(blocks[count - 1])
    frozen = layers[: last + 1]
    for layer in frozen:
        for parameter in layer.parameters.values():
            parameter.requires_grad_(False)
    return [module for layer in frozen for module in layer.modules]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network: residual blocks, transformer layers.

    These are the members of `Sequential` and `ModuleList` containers, stages of stages included,
    that consist of layers and have their own `forward`. A single layer is not a block: often its
    weights are read without calling it, it has nothing to fuse, and computing it twice saves no
    memory. Containers inside a block are part of the block. A container may hold a single block,
    as in a network of one layer or a stage of one.
    """
    found: list[nn.Module] = []
    for child in model.children():
        blocks = _blocks_in(child) if _is_container(child) else []
        found += blocks or repeated_blocks(child)
    return found


def inner_blocks(block: nn.Module) -> list[nn.Module]:
    """The blocks in the lists of a block, such as those of a stage; none for a plain block."""
    lists = [child for child in block.children() if _is_container(child)]
    return [inner for one in lists for inner in _blocks_in(one)]


def _blocks_in(container: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for member in container.children():
        inner = _blocks_in(member) if _is_container(member) else []
        if inner or not _is_block(member):
            found += inner
        else:
            found.append(member)
    return found


def _is_container(module: nn.Module) -> bool:
    """Return whether a module is a list of others that it only calls one after the other."""
    own = type(module).forward not in (nn.Sequential.forward, nn.Module.forward)
    return isinstance(module, nn.Sequential | nn.ModuleList) and not own


def _is_block(module: nn.Module) -> bool:
    called = type(module).forward is not nn.Module.forward
    return called and any(True for child in module.children() for _ in child.parameters())


def compile_blocks(blocks: Sequence[nn.Module]) -> int:
    """Let torch compile each block, in place; returns how many there are.

    Blocks are compiled rather than the whole model: equal blocks are compiled once, and the code
    between them need not be compilable. Parameter names stay the same.
    """
    import torch._dynamo  # takes a second to import, which other runs need not wait for

    # Each width of a residual network and each length of report counts as a compilation.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))
    block: Any
    for block in blocks:
        if _is_computed_twice(block):
            block.forward = partial(_computed_twice, block, torch.compile(block.forward.args[1]))
        else:
            block.forward = torch.compile(block.forward)
    return len(blocks)


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> int:
    """Keep only the input of each block for the backward pass, in place; returns how many.

    The backward pass computes the block again with the same random numbers (Chen et al. 2016,
    arXiv 1604.06174). Running statistics are updated the first time only. A frozen block keeps
    nothing for the backward pass and stays as it is.
    """
    trained = [block for block in blocks if any(p.requires_grad for p in block.parameters())]
    for block in trained:
        if not _is_computed_twice(block):
            block.forward = partial(_computed_twice, block, block.forward)
    return len(trained)


def _is_computed_twice(block: Any) -> bool:
    return isinstance(block.forward, partial) and block.forward.func is _computed_twice


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
