"""A finished run as a model: embed images and texts, classify, encode, generate; from Python.

    import vilmedic
    model = vilmedic.load("ckpt/my_run")
    images = model.embed_images(["a.png", "b.dcm"])
    texts = model.embed_texts(["Large left pleural effusion.", "Clear lungs."])
    model.similarity(images, texts)

Nothing but the checkpoint is needed: it holds the configuration, the vocabulary, the label names
and how images become pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vilmedic.checkpoints import checkpoint
from vilmedic.checkpoints.repository import fetch_export, is_repository
from vilmedic.config.build import check_arguments
from vilmedic.config.generation import GenerationSection
from vilmedic.config.load import Config
from vilmedic.config.load import load as load_config
from vilmedic.device import autocast, move, pick_device
from vilmedic.errors import CheckpointError, ConfigError, DataError, VilmedicError
from vilmedic.evaluation.from_checkpoint import Loaded, from_checkpoint
from vilmedic.export.folder import write_export
from vilmedic.export.push import check_name
from vilmedic.export.push import push as push_export
from vilmedic.generation.generate import generate_images
from vilmedic.generation.sheet import pixels
from vilmedic.inputs import Groups, OnError, Preprocess, Source, Sources, listed
from vilmedic.manifest import is_export
from vilmedic.metrics.prompts import as_prompts, load_prompts, prompt_weights
from vilmedic.models.contract import ContrastiveModel
from vilmedic.models.dalle import DALLE
from vilmedic.models.vae import VAE

Feature = Literal["visual", "visual_backbone"]
Precision = Literal["fp32", "bf16"]
BATCH = 32
LATE = 3.0
"""Seconds after which a progress bar appears."""


class Attention(NamedTuple):
    """Where the words of a text look in an image.

    Args:
        words: the L words, the opening special token included.
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
        source: a run directory, whose best checkpoint is taken; a checkpoint; a folder that
            `export` wrote, or the name of a repository that holds one, `user/name`.
        ckpt: a checkpoint of the run directory instead of the best: its file name, or `last`.
        config: the configuration of a checkpoint that holds none, as those of dalle-pytorch; its
            `dataset.seq.tokenizer` says where the vocabulary is.
        ema: take the averaged weights that `trainor.ema` kept.
        device: `cpu`, `cuda`, `cuda:N`; None takes a GPU when there is one.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it lacks what a model needs.
        ConfigError: the configuration or the device cannot be used.
    """
    path = find_checkpoint(Path(source), ckpt)
    given = None if config is None else load_config(config).data
    return TrainedModel(from_checkpoint(path, ema=ema, config=given), device=device)


class TrainedModel:
    """A model whose weights are trained; `load` makes one.

    Embeddings and scores are float32 on the CPU. What a model cannot do is a `VilmedicError` that
    says what it can.

    Args:
        loaded: the model and what it knows of its data.
        device: see `load`.
    """

    def __init__(self, loaded: Loaded, *, device: str | None = None) -> None:
        self.model = loaded.model.eval().requires_grad_(False).to(pick_device(device))
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
        """Where the model computes."""
        return next(self.model.parameters()).device

    def to(self, device: str) -> TrainedModel:
        """Move the model to another device; returns it."""
        self.model.to(pick_device(device))
        return self

    @property
    def preprocess(self) -> Preprocess:
        """From an image to what the model takes: float32 [3, H, W], exactly as in evaluation."""
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
        """The methods that this model has a use for."""
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

    def embed_images(
        self,
        images: Sources,
        *,
        features: Feature = "visual",
        normalize: bool = True,
        batch_size: int = BATCH,
        device: str | None = None,
        precision: Precision = "fp32",
        on_error: OnError = "raise",
        workers: int | None = None,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Embed images, as an evaluation sees them.

        Images are read a few batches ahead and given to the model one batch at a time, so that any
        number of them, of a generator say, needs the memory of these batches and of the result.

        Args:
            images: paths, Pillow images and arrays, mixed as you like; a single one; or a folder,
                whose images are taken in the order of `vilmedic.images_in`.
            features: `visual` is what texts are compared with; `visual_backbone` [N, F] are the
                pooled features in front of the projection.
            normalize: scale each embedding to length 1.
            batch_size: images that are encoded at once.
            device: move the model there first.
            precision: arithmetic of the encoder; bf16 is faster on recent hardware.
            on_error: whether an image that cannot be read is an error, or a row of nan with a
                warning.
            workers: threads that read images; None takes one a core.
            cache: folder in which decoded and resized images are kept for the next time, as by
                `dataset.image.cache`; for a list of paths.
            progress: show a bar after a few seconds, on a terminal.

        Returns:
            float32 [N, D].

        Raises:
            DataError: an image cannot be read, or there is none.
            VilmedicError: the model embeds no images.
        """
        stream = self.stream_images(
            images,
            features=features,
            normalize=normalize,
            batch_size=batch_size,
            device=device,
            precision=precision,
            on_error=on_error,
            workers=workers,
            cache=cache,
            progress=progress,
        )
        rows = [rows for rows, _ in stream]
        if not rows:
            raise DataError("embed_images: no images are given.")
        return torch.cat(rows)

    def stream_images(
        self,
        images: Sources,
        *,
        features: Feature = "visual",
        normalize: bool = True,
        batch_size: int = BATCH,
        device: str | None = None,
        precision: Precision = "fp32",
        on_error: OnError = "raise",
        workers: int | None = None,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> Iterator[tuple[Tensor, list[str]]]:
        """The embeddings of `embed_images`, a batch at a time, for results that fit no memory.

        Yields:
            float32 [B, D], and for each row why it is nan, or an empty text.
        """
        self.require("embed_images")
        self._check_options(batch_size, precision, device)
        _check_choice("features", features, get_args(Feature))
        sources = listed(images)
        total = len(sources) if isinstance(sources, Sequence) else None
        batches = self.preprocess.batches(
            sources, batch_size, workers=workers, on_error=on_error, cache=cache
        )
        hidden = None if progress else True
        bar = tqdm(desc="Images", unit="image", total=total, delay=LATE, disable=hidden)
        return self._stream(batches, bar, features, normalize, precision)

    def _stream(
        self,
        batches: Iterator[tuple[Groups, list[str]]],
        bar: Any,
        features: Feature,
        normalize: bool,
        precision: Precision,
    ) -> Iterator[tuple[Tensor, list[str]]]:
        model: Any = self.model

        def encode(batch: Tensor) -> Tensor:
            found: Tensor = model.encode({"images": batch})[features]
            return found

        with bar:
            width = 0
            for groups, errors in batches:
                rows: Tensor | None = None
                for places, group in groups:
                    found = self._run(encode, group, precision)
                    found = functional.normalize(found, dim=1) if normalize else found
                    if rows is None:
                        width = found.shape[1]
                        rows = torch.full((len(errors), width), torch.nan)
                    rows[places] = found
                if rows is None:
                    rows = torch.full((len(errors), width or self._width(features)), torch.nan)
                bar.update(len(errors))
                yield rows, errors

    def embed_texts(
        self,
        texts: str | Sequence[str],
        *,
        normalize: bool = True,
        batch_size: int = BATCH,
        device: str | None = None,
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
        every = _texts(texts)
        parts = []
        hidden = None if progress else True
        bar = tqdm(range(0, len(every), batch_size), "Texts", delay=LATE, disable=hidden)
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
        rows = functional.normalize(self._embeddings(images), dim=1)
        if isinstance(texts, Tensor | np.ndarray) and (given := _rows(texts)) is not None:
            columns = functional.normalize(given, dim=1)
        else:
            columns = self.embed_texts(texts)  # type: ignore[arg-type]
        _check_width(rows, columns)
        return rows @ columns.T

    def zero_shot(
        self,
        images: Tensor | Sources,
        prompts: str | Path | Mapping[str, Any],
        *,
        similarity: Literal["global", "local", "both"] = "global",
        local_aggregation: Literal["sum", "max"] = "max",
    ) -> Tensor:
        """The scores of the metric `zero_shot`: how much an image looks like each class.

        The mean similarity with the positive prompts of a class minus that with its negative ones.

        Args:
            images: embeddings [N, D], or images.
            prompts: `{class: {positive: [text, ...], negative: [text, ...]}}`, or a YAML file of
                it; the classes may be of your own.
            similarity: see the metric; local and both need images rather than embeddings.
            local_aggregation: see the metric.

        Returns:
            float32 [N, L], a column a class, in the order of the prompts.

        Raises:
            DataError: the prompts are not of this form.
        """
        self.require("zero_shot")
        found = prompts if isinstance(prompts, Mapping) else None
        classes = load_prompts(str(prompts), None) if found is None else as_prompts(found)
        if similarity != "global":
            self.require("local_similarity")
        texts = [text for c in classes for side in (c.positive, c.negative) for text in side]
        weights = prompt_weights(classes)
        given = _rows(images)
        sources = listed(images) if given is None else given
        if given is not None and similarity != "global":
            raise DataError("zero_shot: the local similarity needs images, not embeddings.")
        if similarity != "global":
            sources = list(sources)
        whole = local = None
        if similarity != "local":
            rows = functional.normalize(self._embeddings(sources).double(), dim=1)
            unit = functional.normalize(self.embed_texts(texts, normalize=False).double(), dim=1)
            _check_width(rows, unit)
            whole = rows @ (weights.T @ unit).T
        if similarity != "global":
            local = self.local_similarity(sources, texts, aggregation=local_aggregation).double()
            local = local @ weights
        both = [one for one in (whole, local) if one is not None]
        return (sum(both) / len(both)).float()  # type: ignore[union-attr]

    def local_similarity(
        self,
        images: Sources,
        texts: str | Sequence[str],
        *,
        aggregation: Literal["sum", "max"] = "max",
        batch_size: int = BATCH,
        precision: Precision = "fp32",
    ) -> Tensor:
        """How well the words of each text find themselves in the regions of each image.

        Args:
            images: see `embed_images`.
            texts: one or several.
            aggregation: how the words of a text count together.
            batch_size: images that are encoded at once.
            precision: see `embed_images`.

        Returns:
            float32 [N, M].

        Raises:
            VilmedicError: the model compares whole images with whole texts only.
        """
        self.require("local_similarity")
        self._check_options(batch_size, precision, None)
        model: Any = self.model
        every = _texts(texts)
        encoded = [
            self._features(
                "encode_text", self._tokens(every[start : start + batch_size]), precision
            )
            for start in range(0, len(every), batch_size)
        ]
        rows = []
        for groups, errors in self.preprocess.batches(listed(images), batch_size):
            part = torch.empty(len(errors), len(every))
            for places, group in groups:
                batch = {"images": self.preprocess.pixels.normalized(group.to(self.device))}
                regions = self._features("encode", batch, precision)["regions"]
                with torch.inference_mode():
                    found = [
                        model.local_similarity(
                            regions, one["words"], one["word_mask"], aggregation=aggregation
                        ).cpu()
                        for one in encoded
                    ]
                part[places] = torch.cat(found, dim=1)
            rows.append(part)
        if not rows:
            raise DataError("local_similarity: no images are given.")
        return torch.cat(rows)

    def attention(self, image: Source, text: str) -> Attention:
        """Where each word of a text looks in an image.

        Args:
            image: a path, a Pillow image or an array.
            text: the text.

        Raises:
            VilmedicError: the model compares no words with regions.
        """
        self.require("attention")
        assert self._reports is not None
        model: Any = self.model
        batch = {"images": self.preprocess(image)[None].to(self.device)} | self._tokens([text])
        features = self._features("encode", batch, "fp32")
        mask = features["word_mask"]
        with torch.inference_mode():
            maps = model.attention(features["regions"], features["words"], mask)
        count = int(mask.sum())
        return Attention(self._reports.words(text)[:count], maps[0, :count].float().cpu())

    # -- codes

    def encode(self, images: Sources, *, batch_size: int = BATCH) -> Tensor:
        """The codes of images by the VAE: int64 [N, n], rows of the grid from the top.

        Raises:
            VilmedicError: the model has no VAE.
        """
        self.require("encode")
        self._check_options(batch_size, "fp32", None)
        vae, pixels = self._vae, self.preprocess.pixels
        found: list[Tensor] = []
        for groups, errors in self.preprocess.batches(listed(images), batch_size):
            rows: dict[int, Tensor] = {}
            for places, group in groups:
                codes = vae.get_codebook_indices(pixels.normalized(group.to(self.device))).cpu()
                rows |= zip(places, codes, strict=True)
            found += [rows[place] for place in range(len(errors))]
        if not found:
            raise DataError("encode: no images are given.")
        if len(lengths := {len(codes) for codes in found}) > 1:
            raise DataError(
                f"encode: images of several sizes have {min(lengths)} to {max(lengths)} codes, "
                "which make no table. Encode them one by one, or set dataset.image.crop."
            )
        return torch.stack(found)

    def decode(self, codes: Tensor | np.ndarray, *, batch_size: int = BATCH) -> Tensor:
        """The images of codes [N, n]: float32 [N, C, H, W] in 0..1.

        Raises:
            DataError: a code is not in the codebook, or n is no square number.
            VilmedicError: the model has no VAE.
        """
        self.require("decode")
        self._check_options(batch_size, "fp32", None)
        vae = self._vae
        if isinstance(codes, np.ndarray) and codes.dtype.kind in "iu":
            codes = torch.from_numpy(codes.astype(np.int64))
        if (
            not isinstance(codes, Tensor)
            or codes.is_floating_point()
            or codes.dtype == torch.bool
            or codes.ndim != 2
            or not codes.numel()
        ):
            given = type(codes).__name__
            if isinstance(codes, Tensor):
                given = f"{codes.dtype} {list(codes.shape)}"
            raise DataError(
                f"decode: given {given}, allowed: codes as whole numbers [N, n], one row an image."
            )
        with torch.inference_mode():
            found = [vae.decode(part.to(self.device)) for part in codes.split(batch_size)]
        return torch.cat(found).float().cpu()

    def reconstruct(self, images: Sources, *, batch_size: int = BATCH) -> Tensor:
        """Images as their codes hold them: float32 [N, C, H, W] in 0..1."""
        self.require("reconstruct")
        return self.decode(self.encode(images, batch_size=batch_size), batch_size=batch_size)

    def generate(
        self,
        text: str,
        num_images: int = 4,
        seed: int = 0,
        *,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        top_p: float = 1.0,
        cond_scale: float = 1.0,
        batch_size: int = BATCH,
        precision: Precision = "fp32",
    ) -> list[Image.Image]:
        """Images of a text, equal to those of bin/ensemble.py with the same seed and batch size.

        Args:
            text: the report or prompt.
            num_images: how many.
            seed: an image follows from it, from the text and from its own number.
            temperature: see `ensemblor.temperature`, as for all that follow.
            filter_thres: see `ensemblor.filter_thres`.
            top_p: see `ensemblor.top_p`.
            cond_scale: see `ensemblor.cond_scale`.
            batch_size: images made at once.
            precision: arithmetic.

        Returns:
            Pillow images in the order of their numbers.

        Raises:
            ConfigError: an option is out of its range.
            VilmedicError: the model makes no images of texts.
        """
        self.require("generate")
        self._check_options(batch_size, precision, None)
        if not isinstance(text, str):
            raise DataError(f"generate: given {text!r}, allowed: one text.")
        options: dict[str, Any] = {
            "generate_images": True,
            "num_images": num_images,
            "prompt": text,
            "temperature": temperature,
            "filter_thres": filter_thres,
            "top_p": top_p,
            "cond_scale": cond_scale,
        }
        check_arguments(GenerationSection, options)
        section = GenerationSection(**options)
        assert isinstance(self.model, DALLE)
        made = generate_images(
            [self.model],
            self._tokens([text]),
            text,
            section,
            seed=seed,
            batch_size=batch_size,
            device=self.device,
            precision=precision,
        )
        grey = self.preprocess.pixels.color == "grey"
        made = made.mean(dim=1, keepdim=True) if grey else made
        return [Image.fromarray(pixels(image)) for image in made]

    # -- for others

    def export(
        self,
        path: str | Path,
        *,
        onnx: bool = False,
        push: str | None = None,
        public: bool = False,
        force: bool = False,
    ) -> Path:
        """Write the model as a folder that others can use without this project.

        Each part is in the layout of the library that it comes from; see docs/sharing.md. The
        folder appears when it is whole. One of the same weights that is there already stays as it
        is, with what was filled in in its README.md.

        Args:
            path: the folder.
            onnx: write ONNX files as well, each compared with PyTorch on batches of several sizes.
            push: upload the folder to this repository of the Hugging Face hub, `user/name`.
            public: let everybody see the repository.
            force: replace an export of other weights.

        Returns:
            The folder.

        Raises:
            ConfigError: something else is at that place, a package is missing, or the repository
                is public without `public`.
            VilmedicError: a part cannot be exported, or the upload failed.
        """
        if push is not None:
            check_name(push)
        write_export(self._loaded, path, onnx=onnx, force=force)
        if push is not None:
            push_export(Path(path), push, public=public)
        return Path(path)

    # -- what the methods share

    @property
    def _vae(self) -> VAE:
        vae = self.model if isinstance(self.model, VAE) else getattr(self.model, "vae", None)
        assert isinstance(vae, VAE)
        return vae

    def _part(self, name: str, what: str) -> nn.Module:
        part = getattr(self.model, name, None)
        if not isinstance(part, nn.Module):
            raise VilmedicError(f"{type(self.model).__name__} has no {what}. {self._able()}")
        return part

    def require(self, ability: str) -> None:
        """Refuse what the model cannot do, such as `embed_texts`.

        Raises:
            VilmedicError: it cannot; the message says what it can.
        """
        if ability not in self.abilities:
            raise VilmedicError(f"{type(self.model).__name__} has no {ability}. {self._able()}")

    def _able(self) -> str:
        return f"It has {', '.join(self.abilities)}."

    def _check_options(self, batch_size: int, precision: str, device: str | None) -> None:
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ConfigError(f"batch_size: given {batch_size!r}, allowed: an integer >= 1.")
        _check_choice("precision", precision, get_args(Precision))
        if device is not None:
            self.to(device)

    def _embeddings(self, images: Tensor | Sources) -> Tensor:
        """Rows that are embeddings already, or those of images."""
        given = _rows(images)
        return given if given is not None else self.embed_images(images, normalize=False)

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        assert self._reports is not None
        return move(self._reports.encode(texts), self.device)

    def _features(self, method: str, batch: Any, precision: str) -> dict[str, Tensor]:
        with torch.inference_mode(), autocast(self.device, precision):
            found = getattr(self.model, method)(batch)
        return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}

    def _run(self, encode: Any, batch: Any, precision: str) -> Tensor:
        """What an encoder gives for a batch, float32 on the CPU; images arrive as uint8."""
        with torch.inference_mode(), autocast(self.device, precision):
            if isinstance(batch, Tensor):
                batch = self.preprocess.pixels.normalized(batch.to(self.device))
            found: Tensor = encode(batch)
        # a copy outside inference mode, which callers may use anywhere
        return torch.empty_like(found, dtype=torch.float32, device="cpu").copy_(found)

    def _width(self, feature: str) -> int:
        """The width of a feature, for results without a single image that could be read."""
        side = self.preprocess.pixels.crop or self.preprocess.pixels.resize or 64
        blank = torch.zeros(1, self.preprocess.pixels.channels, side, side, dtype=torch.uint8)
        model: Any = self.model
        return self._run(lambda one: model.encode({"images": one})[feature], blank, "fp32").shape[1]


@dataclass(frozen=True)
class Run:
    """A run that was trained.

    Args:
        directory: its directory.
        seed: its seed.
        best: its best checkpoint; None when none has a score.
        last: its newest state, from which `ckpt=auto` continues.
    """

    directory: Path
    seed: int
    best: Path | None
    last: Path

    def load(self, **options: Any) -> TrainedModel:
        """The model of the best checkpoint, or of the newest state without one; see `load`."""
        return load(self.best or self.last, **options)


def train(config: str | Path, *overrides: str, **values: Any) -> Run:
    """Train a model as `bin/train.py` does, with the same checks; messages come as exceptions.

    Args:
        config: the YAML file.
        overrides: words of the command line, such as `trainor.batch_size=32` or `~trainor.ema`.
        values: top-level keys, such as `name="x"` or `ckpt="auto"`.

    Raises:
        VilmedicError: what the command says with status 2.
        Interrupted: a signal ended the run; its state is saved.
    """
    from vilmedic.running import run_training

    trainor = run_training(_config(config, overrides, values))
    best = trainor.saver.best()
    return Run(trainor.run_dir, trainor.seed, best[0].path if best else None, trainor.saver.last)


def evaluate(config: str | Path, *overrides: str, **values: Any) -> dict[str, dict[str, Any]]:
    """Evaluate a run as `bin/ensemble.py` does.

    Args:
        config: see `train`, as for the others.
        overrides: see `train`.
        values: see `train`.

    Returns:
        The results of each split, as they are written to `results_<split>.json`.
    """
    from vilmedic.running import run_ensemble

    return run_ensemble(_config(config, overrides, values))


def _config(path: str | Path, overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
    nested = [name for name, value in values.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"{name}: is a section; give its keys as words, such as '{name}.key=value'."
            for name in nested
        )
    words = [f"{name}={_word(value)}" for name, value in values.items()]
    return load_config(path, [*overrides, *words])


def _word(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, str | Path):
        return str(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _texts(texts: str | Sequence[str]) -> list[str]:
    if not isinstance(texts, Iterable):
        raise DataError(f"texts: given {texts!r}, allowed: a text or a list of texts.")
    every = [texts] if isinstance(texts, str) else list(texts)
    if not every:
        raise DataError("No texts are given.")
    for number, text in enumerate(every):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"text {number}: given {text!r}, allowed: a text that is not empty.")
    return every


def _rows(given: Any) -> Tensor | None:
    """Embeddings, which are [N, D] of floating-point numbers; None for anything else."""
    if isinstance(given, np.ndarray) and given.ndim == 2 and given.dtype.kind == "f":
        return torch.from_numpy(given.astype(np.float32))
    if isinstance(given, Tensor) and given.ndim == 2 and given.is_floating_point():
        return given.detach().float().cpu()
    return None


def _check_width(images: Tensor, texts: Tensor) -> None:
    if images.shape[1] != texts.shape[1]:
        raise DataError(
            f"The embeddings of the images have {images.shape[1]} numbers each and those of the "
            f"texts {texts.shape[1]}: they are not of the same model, or not those of `visual`."
        )


def _check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ConfigError(f"{name}: given '{given}', allowed: {', '.join(allowed)}.")


def find_checkpoint(source: Path, ckpt: str | None) -> Path:
    """The checkpoint of a run directory, or the one that is named; an export is one itself.

    Raises:
        CheckpointError: there is none.
    """
    if not source.exists() and is_repository(str(source)):
        source = fetch_export(str(source))
    if is_export(source):
        if ckpt is not None:
            raise CheckpointError(f"{source}: is an export, so ckpt='{ckpt}' has no meaning.")
        return source
    if not source.is_dir():
        if not source.exists():
            raise CheckpointError(f"{source}: there is no such run directory or checkpoint.")
        if ckpt is not None:
            raise CheckpointError(f"{source}: is a file, so ckpt='{ckpt}' has no meaning.")
        return source
    if ckpt is not None:
        return checkpoint.locate(ckpt, source)
    files = sorted(source.glob("*.pth"))
    if len(files) == 1:
        return files[0]  # such as a folder of the original vilmedic's model zoo
    return checkpoint.find_checkpoints(source, "best-1", remedy="Name one with ckpt=")[0]
