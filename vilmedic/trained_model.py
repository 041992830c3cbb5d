"""A trained model for use from Python: embed, classify, encode, generate.

    import vilmedic
    model = vilmedic.load("ckpt/my_run")
    images = model.embed_images(["a.png", "b.dcm"])
    texts = model.embed_texts(["Large left pleural effusion.", "Clear lungs."])
    model.similarity(images, texts)

Nothing but the checkpoint is needed: it holds the configuration, the vocabulary, the label names
and how images become pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vilmedic.config.load import check_arguments
from vilmedic.config.sections import GenerationSection
from vilmedic.drawing.images import pixels
from vilmedic.embedder import (
    BATCH,
    Embedder,
    Precision,
    as_rows,
    as_texts,
    check_choice,
    check_width,
)
from vilmedic.errors import ConfigError, DataError
from vilmedic.generation.generate import generate_images, token_drawing
from vilmedic.inputs import Source, Sources, listed
from vilmedic.metrics.zero_shot import as_prompts, load_prompts, prompt_weights
from vilmedic.models.dalle import DALLE
from vilmedic.models.vae import VAE


class Attention(NamedTuple):
    """Attention of the words of a text over an image.

    Args:
        words: the L words, the opening special token included.
        maps: weights of the regions for each word, which add up to 1: float32 [L, h, w].
    """

    words: list[str]
    maps: Tensor


class TrainedModel(Embedder):
    """A model whose weights are trained; `vilmedic.load` makes one.

    Args:
        loaded: the model and what it knows of its data.
        device: see `vilmedic.load`.
    """

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
            float32 [N, L], one column per class, in the order of the prompts.

        Raises:
            DataError: the prompts are not of this form.
        """
        self.require("zero_shot")
        check_choice("similarity", similarity, ("global", "local", "both"))
        if isinstance(prompts, Mapping):
            classes = as_prompts(prompts)
        elif isinstance(prompts, str | Path):
            classes = load_prompts(str(prompts), None)
        else:
            kind = type(prompts).__name__
            raise DataError(f"prompts: given a {kind}, allowed: mapping or a YAML file of it.")
        if similarity != "global":
            self.require("local_similarity")
        texts = [text for c in classes for side in (c.positive, c.negative) for text in side]
        weights = torch.from_numpy(prompt_weights(classes).toarray())
        given = as_rows(images, "images")
        sources = listed(images) if given is None else given
        if given is not None and similarity != "global":
            raise DataError("zero_shot: the local similarity needs images, not embeddings.")
        if similarity != "global":
            sources = list(sources)
        whole = local = None
        if similarity != "local":
            rows = functional.normalize(self._embeddings(sources).double(), dim=1)
            unit = functional.normalize(self.embed_texts(texts, normalize=False).double(), dim=1)
            check_width(rows, unit)
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
        check_choice("aggregation", aggregation, ("sum", "max"))
        model: Any = self.model
        every = as_texts(texts)
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
        tokens = self._tokens(as_texts([text]))
        batch = {"images": self.preprocess(image)[None].to(self.device)} | tokens
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
                f"decode: given {given}, allowed: codes as whole numbers [N, n], one row per image."
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
        if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
            raise ConfigError(f"seed: given {seed!r}, allowed: integer from 0 to {2**32 - 1}.")
        tokens = self._tokens(as_texts(text))
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
        with token_drawing([self.model], section, precision) as drawing:
            made = generate_images(
                drawing, tokens, text, num_images=num_images, seed=seed, batch_size=batch_size
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
        # imported here: few who load a model export it
        from vilmedic.export.folder import write_export
        from vilmedic.export.push import check_name
        from vilmedic.export.push import push as push_export

        if push is not None:
            check_name(push)
        write_export(self._loaded, path, onnx=onnx, force=force)
        if push is not None:
            push_export(Path(path), push, public=public)
        return Path(path)

    @property
    def _vae(self) -> VAE:
        vae = self.model if isinstance(self.model, VAE) else getattr(self.model, "vae", None)
        assert isinstance(vae, VAE)
        return vae
