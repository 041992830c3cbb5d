"""Our DALLE and dalle-pytorch's with the same weights, for the benchmarks."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parity.reference import load_reference
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.vocabulary import train_vocabulary
from vilmedic.models.dalle import DALLE
from vilmedic.models.dalle_settings import FrozenVAE, TransformerSettings


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add options for the model sizes; defaults are those of the published comparison."""
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim-head", type=int, default=64)
    parser.add_argument("--text-len", type=int, default=64)
    parser.add_argument("--image-side", type=int, default=16, help="image tokens along a side")
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--codes", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")


def make_models(arguments: argparse.Namespace) -> tuple[DALLE, Any]:
    """Our model, and the reference with the same weights."""
    reference = load_reference()
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "image_size": 4 * arguments.image_side,
        "num_layers": 2,
        "num_tokens": arguments.codes,
        "codebook_dim": 32,
        "hidden_dim": 16,
    }
    vae = reference.DiscreteVAE(**shape)
    settings: dict[str, Any] = {
        "dim": arguments.dim,
        "depth": arguments.depth,
        "heads": arguments.heads,
        "dim_head": arguments.dim_head,
        "text_seq_len": arguments.text_len,
        "num_text_tokens": arguments.words,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vae.pth"
        torch.save({"model": vae.state_dict(), "config": {"model": shape}}, path)
        spec = DataSpec(
            tokenizer=train_vocabulary(["no effusion"], min_frequency=1),
            tokenizer_max_len=arguments.text_len,
        )
        ours = DALLE(
            spec=spec, vae=FrozenVAE(ckpt=str(path)), dalle=TransformerSettings(**settings)
        )
    peer = reference.DALLE(vae=vae, **settings)
    peer.load_state_dict(ours.state_dict())
    return ours.to(arguments.device), peer.to(arguments.device)


def make_reports(arguments: argparse.Namespace, size: int) -> Tensor:
    """Random reports of full length, [size, text_len]; no token has the id 0."""
    random = torch.Generator().manual_seed(0)
    reports = torch.randint(1, arguments.words, (size, arguments.text_len), generator=random)
    return reports.to(arguments.device)
