"""Embedding of images and texts with a trained model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vilmedic.datasets.lines import brief
from vilmedic.device import inference, move, pick_device, weights_converted_once
from vilmedic.errors import ConfigError, DataError, VilmedicError
from vilmedic.inputs import Groups, OnError, Preprocess, Sources, listed
from vilmedic.models.contract import ContrastiveModel
from vilmedic.models.dalle import DALLE
from vilmedic.models.from_checkpoint import Loaded
from vilmedic.models.vae import VAE

Feature = Literal["visual", "visual_backbone"]
Precision = Literal["fp32", "bf16"]
Rows = Iterator[tuple[Tensor, list[str]]]
BATCH = 32
LATE = 3.0
"""Seconds after which a progress bar appears."""

P = ParamSpec("P")
T = TypeVar("T")
Own = TypeVar("Own", bound="Embedder")


def options_of(method: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a method the signature of the method that it passes its options to."""

    def mark(own: Callable[..., T]) -> Callable[P, T]:
        result = inspect.signature(own).return_annotation
        shown = inspect.signature(method).replace(return_annotation=result)
        own.__signature__ = shown  # type: ignore[attr-defined]
        return own

    return mark


class Embedder:
    """A trained model that embeds images and texts.

    Embeddings and scores are float32 on the CPU. Methods that a model does not support raise a
    `VilmedicError` that lists those it does.

    Args:
        loaded: the model and its data properties.
        device: see `load`.
    """

    def __init__(self, loaded: Loaded, *, device: str | torch.device | None = None) -> None:
        self.model = loaded.model.eval().requires_grad_(False)
        self.to(device)
        self.config, self.path = loaded.config, loaded.path
        self._loaded = loaded
        self.spec = loaded.spec
        self._reports = loaded.reports
        self._preprocess = None if loaded.pixels is None else Preprocess(loaded.pixels)

    def __repr__(self) -> str:
        able = ", ".join(self.abilities)
        return f"<{type(self.model).__name__} of {self.path}: {able}>"

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def to(self: Own, device: str | torch.device | None) -> Own:
        """Move the model to another device, None to a GPU when there is one; returns it."""
        self.model.to(pick_device(None if device is None else str(device)))
        return self

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing from an image to float32 [3, H, W], exactly as in evaluation."""
        if self._preprocess is None:
            raise VilmedicError(f"{self.path} was trained without images.")
        return self._preprocess

    @property
    def image_encoder(self) -> nn.Module:
        """The image encoder, a plain module: images [B, 3, H, W] to features."""
        return self._part("cnn", "image encoder")

    @property
    def text_encoder(self) -> nn.Module:
        """The text encoder, a plain module: `input_ids` and `attention_mask` [B, T] to features."""
        return self._part("encoder", "text encoder")

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names of the training data; empty when there were none."""
        return self.spec.labels

    @property
    def abilities(self) -> list[str]:
        """The methods that this model supports."""
        found = []
        if isinstance(self.model, ContrastiveModel):
            found.append("embed_images")
            if self._reports is not None and hasattr(self.model, "encoder"):
                found += ["embed_texts", "similarity", "zero_shot"]
        if hasattr(self.model, "local_similarity"):
            found += ["local_similarity", "attention"]
        if isinstance(self.model, VAE | DALLE):
            found += ["encode", "decode", "reconstruct"]
        if isinstance(self.model, DALLE) and self._reports is not None:
            found.append("generate")
        return found

    # -- embeddings

    def stream_images(
        self,
        images: Sources,
        *,
        features: Feature = "visual",
        normalize: bool = True,
        batch_size: int = BATCH,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        on_error: OnError = "raise",
        workers: int | None = None,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> Rows:
        """The embeddings of `embed_images`, a batch at a time, for results that fit no memory.

        The arguments are those of `embed_images`.

        Yields:
            float32 [B, D], and for each row the reason if it is nan, or an empty text.
        """
        self.require("embed_images")
        self._check_options(batch_size, precision, device)
        check_choice("features", features, get_args(Feature))
        sources = listed(images)
        total = len(sources) if isinstance(sources, Sequence) else None
        batches = self.preprocess.batches(
            sources, batch_size, workers=workers, on_error=on_error, cache=cache
        )
        model: Any = self.model

        def embed(batch: Tensor) -> Tensor:
            rows = self._run(lambda one: model.encode({"images": one})[features], batch, precision)
            return functional.normalize(rows, dim=1) if normalize else rows

        hidden = None if progress else True
        bar = tqdm(desc="Images", unit="image", total=total, delay=LATE, disable=hidden)
        return self._stream(batches, embed, bar)

    @options_of(stream_images)
    def embed_images(self, images: Sources, **options: Any) -> Tensor:
        """Embed images, as an evaluation sees them.

        Images are read a few batches ahead and embedded batch by batch, so that any number of
        them, for example from a generator, only needs memory for these batches and the result.

        Args:
            images: paths, Pillow images and arrays, mixed as you like; a single one; or a folder,
                whose images are taken in the order of `vilmedic.images_in`.
            features: `visual` for comparisons with texts; `visual_backbone` [N, F] for the pooled
                features before the projection.
            normalize: scale each embedding to length 1.
            batch_size: images that are encoded at once.
            device: move the model there first.
            precision: arithmetic of the encoder; bf16 is faster on recent hardware.
            on_error: whether an image that cannot be read is an error, or a row of nan with a
                warning.
            workers: threads that read images; None takes one per core.
            cache: folder in which decoded and resized images are kept for the next time, as by
                `dataset.image.cache`; for a list of paths.
            progress: show a bar after a few seconds, on a terminal.

        Returns:
            float32 [N, D].

        Raises:
            DataError: an image cannot be read, or there is none.
            VilmedicError: the model embeds no images.
        """
        kept, width = (
            bytearray(),
            0,
        )  # small tensors would take several times the memory
        for rows, _ in self.stream_images(images, **options):
            kept += rows.numpy().tobytes()
            width = rows.shape[1]
        if not kept:
            raise DataError("embed_images: no images are given.")
        return torch.frombuffer(kept, dtype=torch.float32).view(-1, width)

    def _stream(
        self,
        batches: Iterator[tuple[Groups, list[str]]],
        embed: Callable[[Tensor], Tensor],
        bar: Any,
    ) -> Rows:
        with bar:
            width = 0
            for groups, errors in batches:
                found = [(places, embed(group)) for places, group in groups]
                width = found[0][1].shape[1] if found else width or embed(self._blank()).shape[1]
                rows = torch.full((len(errors), width), torch.nan)
                for places, part in found:
                    rows[places] = part
                bar.update(len(errors))
                yield rows, errors

    def embed_texts(
        self,
        texts: str | Sequence[str],
        *,
        normalize: bool = True,
        batch_size: int = BATCH,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        progress: bool = True,
    ) -> Tensor:
        """Embed texts: cleaned, tokenized and cut as the reports of the training were.

        Args:
            texts: one or several.
            normalize: scale each embedding to length 1.
            batch_size: texts that are encoded at once.
            device: move the model there first.
            precision: see `embed_images`.
            progress: see `embed_images`.

        Returns:
            float32 [M, D].

        Raises:
            DataError: there is no text, or an empty one.
            VilmedicError: the model embeds no texts.
        """
        self.require("embed_texts")
        self._check_options(batch_size, precision, device)
        every = as_texts(texts)
        parts = []
        hidden = None if progress else True
        bar = tqdm(range(0, len(every), batch_size), "Texts", delay=LATE, disable=hidden)
        with weights_converted_once(self.device, precision, self.model):
            for start in bar:
                batch = self._tokens(every[start : start + batch_size])
                parts.append(self._features("encode_text", batch, precision)["linguistic"].cpu())
        found = torch.cat(parts)
        return functional.normalize(found, dim=1) if normalize else found

    def similarity(
        self, images: Tensor | Sources, texts: Tensor | np.ndarray | str | Sequence[str]
    ) -> Tensor:
        """The cosine similarity of every image and every text.

        Args:
            images: embeddings [N, D], a tensor or an array of floating-point numbers, as those of
                bin/embed.py; or images.
            texts: embeddings [M, D], likewise; or texts.

        Returns:
            float32 [N, M].

        Raises:
            DataError: the embeddings are of another width than those of the model.
        """
        self.require("similarity")
        columns = as_rows(texts, "texts")
        if columns is None:
            columns = self.embed_texts(texts)  # type: ignore[arg-type]
        rows = self._embeddings(images)
        check_width(rows, columns)
        return functional.normalize(rows, dim=1) @ functional.normalize(columns, dim=1).T

    # -- shared by the methods

    def _part(self, name: str, what: str) -> nn.Module:
        part = getattr(self.model, name, None)
        if not isinstance(part, nn.Module):
            raise VilmedicError(f"{type(self.model).__name__} has no {what}. {self._able()}")
        return part

    def require(self, ability: str) -> None:
        """Refuse a method that the model does not support, such as `embed_texts`.

        Raises:
            VilmedicError: it is not supported; lists the supported methods.
        """
        if ability not in self.abilities:
            raise VilmedicError(f"{type(self.model).__name__} has no {ability}. {self._able()}")

    def _able(self) -> str:
        return f"It has {', '.join(self.abilities)}."

    def _check_options(
        self, batch_size: int, precision: str, device: str | torch.device | None
    ) -> None:
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ConfigError(f"batch_size: given {batch_size!r}, allowed: integer >= 1.")
        check_choice("precision", precision, get_args(Precision))
        if device is not None:
            self.to(device)

    def _embeddings(self, images: Tensor | Sources) -> Tensor:
        """Return given embeddings, or embed images."""
        given = as_rows(images, "images")
        return given if given is not None else self.embed_images(images, normalize=False)

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        assert self._reports is not None
        return move(self._reports.encode(texts), self.device)

    def _features(self, method: str, batch: Any, precision: str) -> dict[str, Tensor]:
        with inference(self.device, precision):
            found = getattr(self.model, method)(batch)
        return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}

    def _run(self, encode: Any, batch: Any, precision: str) -> Tensor:
        """Run an encoder on a batch: float32 on the CPU; images are uint8."""
        with inference(self.device, precision):
            if isinstance(batch, Tensor):
                batch = self.preprocess.pixels.normalized(batch.to(self.device))
            found: Tensor = encode(batch)
        # a copy outside inference mode, usable anywhere
        return torch.empty_like(found, dtype=torch.float32, device="cpu").copy_(found)

    def _blank(self) -> Tensor:
        """Return a plain image, to find the feature width if no image can be read."""
        side = self.preprocess.pixels.crop or self.preprocess.pixels.resize or 64
        return torch.zeros(1, self.preprocess.pixels.channels, side, side, dtype=torch.uint8)


def as_texts(texts: Any) -> list[str]:
    """Check texts.

    Raises:
        DataError: there is none, or one is empty or no text.
    """
    if not isinstance(texts, Iterable):
        raise DataError(f"texts: given {texts!r}, allowed: a text or a list of texts.")
    every = [texts] if isinstance(texts, str) else list(texts)
    if not every:
        raise DataError("No texts are given.")
    for number, text in enumerate(every):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"text {number}: given {text!r}, allowed: a text that is not empty.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {number}: '{brief(text)}' holds {text[error.start]!r}, half of a character, "
                "as when bytes that are no UTF-8 were decoded with surrogateescape."
            ) from None
    return every


def as_rows(given: Any, what: str) -> Tensor | None:
    """Return given embeddings [N, D]; None for anything that may be an image or a text.

    Args:
        given: embeddings, images or texts.
        what: `images` or `texts`.

    Raises:
        DataError: numbers that can be neither.
    """
    if isinstance(given, np.ndarray) and given.dtype.kind in "biufc":
        kind = str(given.dtype)
        floating = given.dtype.kind == "f"
    elif isinstance(given, Tensor):
        kind = str(given.dtype).removeprefix("torch.")
        floating = given.is_floating_point()
    else:
        return None
    if given.ndim == 2 and floating:
        if isinstance(given, np.ndarray):
            return torch.from_numpy(given.astype(np.float32))
        return given.detach().float().cpu()
    if given.ndim < 2 or what == "texts":
        raise DataError(
            f"{what}: given {kind} {list(given.shape)}, allowed: {what}, or embeddings [N, D] of "
            "floating-point numbers, a row for each."
        )
    return None


def check_width(images: Tensor, texts: Tensor) -> None:
    """Refuse embeddings of different models.

    Raises:
        DataError: they are of different widths.
    """
    if images.shape[1] != texts.shape[1]:
        raise DataError(
            f"The embeddings of the images have {images.shape[1]} numbers each and those of the "
            f"texts {texts.shape[1]}: they are not of the same model, or not those of `visual`."
        )


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    """Refuse an option with a value that is not allowed.

    Raises:
        ConfigError: it is not.
    """
    if given not in allowed:
        raise ConfigError(f"{name}: given '{given}', allowed: {', '.join(allowed)}.")
