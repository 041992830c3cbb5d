"""A finished run as a model: embed images and texts, classify, encode, generate; from Python.

    import vilmedic
    model = vilmedic.load("ckpt/my_run")
    images = model.embed_images(["a.png", "b.dcm"])
    texts = model.embed_texts(["Large left pleural effusion.", "Clear lungs."])
    model.similarity(images, texts)

Nothing but the checkpoint is needed: it holds the configuration, the vocabulary, the label names and
how images become pixels.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vilmedic.blocks.pretrained import Filled
from vilmedic.config.build import build
from vilmedic.config.generation import GenerationSection
from vilmedic.config.load import load as load_config
from vilmedic.config.overrides import word
from vilmedic.config.trained import parts
from vilmedic.datasets.decode import SUFFIXES
from vilmedic.datasets.pixels import Pixels
from vilmedic.datasets.report_tokens import ReportTokens
from vilmedic.datasets.spec import DataSpec
from vilmedic.errors import CheckpointError, ConfigError, DataError, VilmedicError
from vilmedic.executors import checkpoint
from vilmedic.executors.collect import evaluating
from vilmedic.executors.device import autocast, cores, move, pick_device
from vilmedic.metrics.prompts import ClassPrompts, as_prompts, load_prompts
from vilmedic.metrics.zero_shot import directions, prompt_weights
from vilmedic.models.contract import ContrastiveModel, Model
from vilmedic.models.dalle import DALLE
from vilmedic.models.vae import VAE
from vilmedic.preparation.walk import walk_files
from vilmedic.registry import MODELS

Source = str | Path | Image.Image | np.ndarray | Tensor
"""An image: a file that `dataset.image` reads, a Pillow image, or an array [H, W] or [H, W, 3]."""
Sources = Source | Iterable[Source]
Precision = Literal["fp32", "bf16"]
OnError = Literal["raise", "skip"]
BATCH = 32
LATE = 3.0
"""Seconds after which a progress bar appears."""


class Attention(NamedTuple):
    """Where the words of a text look in an image.

    Args:
        words: the L words, special tokens included.
        maps: weights of the regions for each word, which add up to 1: float32 [L, h, w].
    """

    words: list[str]
    maps: Tensor


def load(
    source: str | Path,
    *,
    ckpt: str | None = None,
    config: str | Path | None = None,
    ema: bool = False,
    device: str | None = None,
) -> TrainedModel:
    """A trained model, ready to be used.

    Args:
        source: a run directory, whose best checkpoint is taken, or a checkpoint.
        ckpt: a checkpoint of the run directory instead: its file name, or `last`.
        config: the configuration of a checkpoint that holds none, as those of dalle-pytorch.
        ema: take the averaged weights that `trainor.ema` kept.
        device: `cpu`, `cuda`, `cuda:N`; None takes a GPU when there is one.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it lacks what a model needs.
    """
    path = _find(Path(source), ckpt)
    state = checkpoint.load_checkpoint(path)
    settings = _configuration(state, path, config)
    spec = _spec(state, settings, path)
    node = copy.deepcopy(settings["model"])
    if isinstance(node.get("vae"), dict):
        node["vae"]["ckpt"] = str(path)  # a DALLE checkpoint holds its VAE
    filled = Filled(state.get("networks") or {})
    model: Model = build(MODELS, node, spec=spec, filled=filled)
    checkpoint.load_weights(model, state, path, ema=ema)
    if step := (state.get("progress") or {}).get("step"):
        model.schedule(step)
    return TrainedModel(model.to(pick_device(device)), settings, spec, path)


class TrainedModel:
    """A model whose weights are trained; `load` makes one.

    Embeddings and scores are float32 on the CPU. What a model cannot do is a `VilmedicError` that
    says what it can.

    Args:
        model: the system, on its device.
        config: the configuration that it was trained with.
        spec: its tokenizer and label names.
        path: the checkpoint.
    """

    def __init__(
        self, model: Model, config: Mapping[str, Any], spec: DataSpec, path: Path
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config, self.spec, self.path = config, spec, path
        nodes = {name: node for name, (_, node) in parts(config["dataset"])}
        self.preprocess = Preprocess(Pixels.of(nodes["ImageDataset"]))
        self._reports: ReportTokens | None = None
        if spec.tokenizer is not None:
            self._reports = ReportTokens.of(nodes["TextDataset"], spec)

    def __repr__(self) -> str:
        able = ", ".join(self.abilities)
        return f"{type(self.model).__name__} of {self.path}, which can: {able}"

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def to(self, device: str) -> TrainedModel:
        """Move the model to another device."""
        self.model.to(pick_device(device))
        return self

    @property
    def image_encoder(self) -> nn.Module:
        """The image encoder, a plain module: images [B, 3, H, W] to features."""
        return self._part("cnn", "an image encoder")

    @property
    def text_encoder(self) -> nn.Module:
        """The text encoder, a plain module: `input_ids` and `attention_mask` [B, T] to features."""
        return self._part("encoder", "a text encoder")

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names of the data that the model was trained or evaluated on."""
        return self.spec.labels

    @property
    def abilities(self) -> list[str]:
        """The methods that this model has a use for."""
        found = []
        if isinstance(self.model, ContrastiveModel):
            found.append("embed_images")
            if self._reports is not None:
                found += ["embed_texts", "similarity", "zero_shot"]
        if hasattr(self.model, "local_similarity"):
            found += ["attention", "local_similarity"]
        if isinstance(self.model, VAE):
            found += ["encode", "decode", "reconstruct"]
        if isinstance(self.model, DALLE):
            found += ["encode", "decode", "generate"]
        return found

    # -- embeddings

    def embed_images(
        self,
        images: Sources,
        *,
        features: Literal["visual", "visual_backbone"] = "visual",
        normalize: bool = True,
        batch_size: int = BATCH,
        precision: Precision = "fp32",
        on_error: OnError = "raise",
        workers: int | None = None,
    ) -> Tensor:
        """Embed images, as an evaluation sees them.

        Images are read a few batches ahead and given to the model one batch at a time, so that any
        number of them, a generator say, needs the memory of these batches and of the result.

        Args:
            images: paths, Pillow images and arrays, mixed as you like; a single one; or a folder,
                whose images are taken in the order of `images_in`.
            features: `visual` is what texts are compared with; `visual_backbone` [N, F] are the
                pooled features in front of the projection.
            normalize: scale each embedding to length 1.
            batch_size: images that are encoded at once.
            precision: arithmetic of the encoder; bf16 is faster on recent hardware.
            on_error: whether an image that cannot be read is an error, or a row of nan with a
                warning.
            workers: threads that read images; None takes one a core.

        Returns:
            float32 [N, D].

        Raises:
            DataError: an image cannot be read, or there is none.
            VilmedicError: the model embeds no images.
        """
        rows = [
            row
            for row, _ in self.stream_images(
                images,
                features=features,
                normalize=normalize,
                batch_size=batch_size,
                precision=precision,
                on_error=on_error,
                workers=workers,
            )
        ]
        if not rows:
            raise DataError("embed_images: no images are given.")
        return torch.cat(rows)

    def stream_images(
        self,
        images: Sources,
        *,
        features: Literal["visual", "visual_backbone"] = "visual",
        normalize: bool = True,
        batch_size: int = BATCH,
        precision: Precision = "fp32",
        on_error: OnError = "raise",
        workers: int | None = None,
        progress: bool = True,
    ) -> Iterator[tuple[Tensor, list[str]]]:
        """The embeddings of `embed_images`, a batch at a time, for results that fit no memory.

        Args:
            progress: show a bar after a few seconds.

        Yields:
            float32 [B, D], and for each row why it is nan, or an empty text.
        """
        self._check("embed_images")
        check_batch(batch_size)
        batches = self.preprocess.batches(_listed(images), batch_size, workers, on_error)
        total = len(images) if isinstance(images, Sequence) else None
        with tqdm(
            desc="Images", unit="image", total=total, delay=LATE, disable=None if progress else True
        ) as bar:
            for pixels, errors in batches:
                found = self._encode_images(pixels, features, precision)
                if normalize:
                    found = functional.normalize(found, dim=1)
                good = torch.tensor([not error for error in errors])
                rows = torch.full((len(errors), found.shape[1]), torch.nan)
                rows[good] = found
                bar.update(len(errors))
                yield rows, errors
