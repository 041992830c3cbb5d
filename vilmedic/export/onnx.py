"""ONNX export, one file per tower, verified against PyTorch before it is published."""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.errors import ConfigError, VilmedicError
from vilmedic.export.parts import side_of
from vilmedic.manifest import ONNX_FOLDER
from vilmedic.models.contract import ContrastiveModel
from vilmedic.models.dalle import DALLE
from vilmedic.models.from_checkpoint import Loaded
from vilmedic.models.vae import VAE

OPSET = 18
LARGEST_DIFFERENCE = 1e-4
LEAST_COSINE = 1 - 1e-5
BATCHES = (1, 2, 5)
"""Batch sizes on which a file is compared, each with another text length."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FILE = 1_900_000_000  # bytes of weights; a file of protobuf ends at 2 GiB

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Tower:
    """One tower, exported as one ONNX file.

    Args:
        name: of the file.
        module: gives the outputs for the inputs, in their orders.
        inputs: a batch of inputs for it, by its size and number.
        dynamic: for each input the names of the dimensions of any size, by number.
        outputs: names of the outputs.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int, int], Inputs]
    dynamic: Mapping[str, dict[int, str]]
    outputs: tuple[str, ...]


def require_packages() -> None:
    """Refuse an ONNX export without its packages.

    Raises:
        ConfigError: a package is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--onnx: needs {', '.join(missing)}, which the extra [onnx] brings and which is not "
            "installed."
        )


def write_onnx(loaded: Loaded, folder: Path) -> dict[str, Any]:
    """Write the towers of a model into the folder `onnx` of an export.

    Returns:
        The opset, and for each file its inputs, its outputs and the largest difference found.

    Raises:
        VilmedicError: a tower cannot be exported, or its outputs differ from PyTorch.
    """
    import onnxruntime

    target = folder / ONNX_FOLDER
    target.mkdir()
    files = {}
    for tower in _towers(loaded):
        path = target / f"{tower.name}.onnx"
        _export(tower, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        files[path.name] = {
            "inputs": {one.name: list(one.shape) for one in session.get_inputs()},
            "outputs": {one.name: list(one.shape) for one in session.get_outputs()},
            "largest_difference": compare(tower, partial(session.run, None)),
        }
    return {"opset": OPSET, "files": files}


@torch.inference_mode()
def compare(tower: Tower, run: Callable[[dict[str, Any]], list[Any]]) -> float:
    """Compare an exported tower with its module on batches of several sizes.

    Args:
        tower: the module and its inputs.
        run: gives the outputs for inputs as arrays, in the order of the tower.

    Returns:
        The largest difference of a number.

    Raises:
        VilmedicError: a number differs by more than 1e-4, or a vector has another direction.
    """
    worst = 0.0
    for number, size in enumerate(BATCHES):
        given = tower.inputs(size, number)
        expected = tower.module(*given.values())
        try:
            found = run({name: value.numpy() for name, value in given.items()})
        except Exception as error:  # the runtime raises many kinds
            raise VilmedicError(
                f"{tower.name}.onnx: fails on {_sizes(given)}: {_first_line(error)}. Nothing is "
                "exported."
            ) from error
        for name, own, other in zip(tower.outputs, expected, found, strict=True):
            theirs = torch.from_numpy(np.asarray(other))
            problem = _difference(own, theirs)
            if problem:
                raise VilmedicError(
                    f"{tower.name}.onnx: '{name}' of {_sizes(given)} is not what PyTorch computes: "
                    f"{problem}. Allowed: at most {LARGEST_DIFFERENCE:g}, and a cosine above "
                    f"{LEAST_COSINE:.5f}. Nothing is exported."
                )
            if own.is_floating_point():
                worst = max(worst, float((own - theirs).abs().max()))
    return worst


def _difference(own: Tensor, theirs: Tensor) -> str:
    """Return how an output differs from the expected one; empty if it does not."""
    if own.shape != theirs.shape:
        return f"it is {list(theirs.shape)} where {list(own.shape)} was expected"
    if not own.is_floating_point():
        others = int((own != theirs).sum())
        return f"{others} of {own.numel()} values are others" if others else ""
    largest = float((own - theirs).abs().max())
    rows = own.flatten(1).double(), theirs.flatten(1).double()
    cosines = functional.cosine_similarity(*rows, eps=0.0)
    cosine = float(cosines[rows[0].any(dim=1)].amin()) if rows[0].any() else 1.0
    if not (largest <= LARGEST_DIFFERENCE and cosine > LEAST_COSINE):
        return f"the largest difference is {largest:.3g} and the least cosine {cosine:.7f}"
    return ""


def _towers(loaded: Loaded) -> Iterator[Tower]:
    model = loaded.model
    if isinstance(model, VAE | DALLE):
        vae = model if isinstance(model, VAE) else model.vae
        yield from _vae_towers(vae)
        return
    if not isinstance(model, ContrastiveModel):
        raise VilmedicError(f"{type(model).__name__} has no tower that could become an ONNX file.")
    if loaded.pixels is not None:
        yield _image_tower(model, loaded)
    if loaded.reports is not None and hasattr(model, "encoder"):
        yield _text_tower(model, loaded)


def _image_tower(model: ContrastiveModel, loaded: Loaded) -> Tower:
    assert loaded.pixels is not None
    side = side_of(loaded)
    pixels = loaded.pixels

    def inputs(size: int, number: int) -> Inputs:
        random = torch.Generator().manual_seed(number)
        shape = (size, pixels.channels, side, side if pixels.crop else side + 8 * number)
        drawn = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        return {"images": pixels.normalized(drawn).contiguous()}

    dynamic = {0: "batch"} if pixels.crop else {0: "batch", 2: "height", 3: "width"}
    module = _Encode(model, "encode", ("images",))
    return Tower("image_encoder", module, inputs, {"images": dynamic}, module.outputs(inputs))


def _text_tower(model: ContrastiveModel, loaded: Loaded) -> Tower:
    reports = loaded.reports
    assert reports is not None
    words = hasattr(model, "local_similarity")  # compares single words
    names = ("input_ids", "attention_mask", *(("word_ids",) if words else ()))
    vocabulary = loaded.spec.vocab_size or 1
    longest = reports.max_len

    def inputs(size: int, number: int) -> Inputs:
        """Return texts of all lengths up to a number, padded as by a data set."""
        random = torch.Generator().manual_seed(number)
        samples = []
        most = (longest, max(2, longest // 2), min(8, longest))[number % 3]
        for row in range(size):
            length = max(2, most * (row + 1) // size)
            ids = torch.randint(0, vocabulary, (length,), generator=random).tolist()
            samples.append({"ids": ids, "words": [place * 2 // 3 for place in range(length)]})
        batch = reports.pad(samples)
        return {name: batch[name] for name in names}

    module = _Encode(model, "encode_text", names)
    dynamic = {name: {0: "batch", 1: "tokens"} for name in names}
    return Tower("text_encoder", module, inputs, dynamic, module.outputs(inputs))


def _vae_towers(vae: VAE) -> Iterator[Tower]:
    def images(size: int, number: int) -> Inputs:
        random = torch.Generator().manual_seed(number)
        shape = (size, vae.channels, vae.image_size, vae.image_size)
        return {"images": torch.rand(shape, generator=random)}

    def codes(size: int, number: int) -> Inputs:
        random = torch.Generator().manual_seed(number)
        return {"codes": torch.randint(0, vae.num_tokens, (size, vae.grid**2), generator=random)}

    batch = {0: "batch"}
    yield Tower("vae_encoder", _VAEEncoder(vae), images, {"images": batch}, ("logits",))
    yield Tower("vae_decoder", _VAEDecoder(vae), codes, {"codes": batch}, ("images",))


class _Encode(nn.Module):
    """Output of a model for images or texts alone, as a tuple."""

    def __init__(self, model: ContrastiveModel, method: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.method, self.names = model, method, names

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the features in the model's order."""
        return tuple(self._features(*given).values())

    def outputs(self, inputs: Callable[[int, int], Inputs]) -> tuple[str, ...]:
        """The names of the features."""
        with torch.inference_mode():
            return tuple(self._features(*inputs(2, 0).values()))

    def _features(self, *given: Tensor) -> dict[str, Tensor]:
        batch = dict(zip(self.names, given, strict=True))
        found: dict[str, Tensor] = getattr(self.model, self.method)(batch)
        return found


class _VAEEncoder(nn.Module):
    """Images in 0..1 to the logits of codes."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        """[B, C, H, W] to [B, K, h, w]; the largest of the K is the code of a position."""
        (images,) = given
        return (self.vae.encoder(self.vae.pixels.normalize(images)),)


class _VAEDecoder(nn.Module):
    """Codes to images in 0..1."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        """[B, N], rows from the top, to [B, C, H, W]."""
        (codes,) = given
        side = math.isqrt(codes.shape[1])
        vectors = self.vae.codebook(codes).transpose(1, 2).unflatten(2, (side, side))
        return (self.vae.pixels.restore(self.vae.decoder(vectors)),)


def _export(tower: Tower, path: Path) -> None:
    """Write a tower, without output of the exporter."""
    # the exporter changes the objects that it traces
    module = copy.deepcopy(tower.module).eval()
    given = tower.inputs(BATCHES[1], 0)
    bytes_of_weights = sum(one.numel() * one.element_size() for one in module.parameters())
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(given.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(given),
                output_names=list(tower.outputs),
                dynamic_shapes=(tuple(tower.dynamic[name] for name in given),),
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=bytes_of_weights > LARGEST_FILE)
    except OSError:  # of the disk, not of the network
        raise
    except Exception as error:  # the exporter raises errors of many kinds
        raise VilmedicError(
            f"{path.name}: torch cannot export this network to ONNX: "
            f"{_first_line(error.__cause__ or error)}. Nothing is exported; without --onnx the "
            "folder is written."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress messages and the warnings of the exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _sizes(given: Inputs) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())


def _first_line(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {line}".rstrip(": ")
