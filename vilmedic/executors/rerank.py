"""How well images agree with a report, as a trained ConVIRT sees it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.config.build import build
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.report_cleaning import CLEANERS
from vilmedic.datasets.spec import DataSpec
from vilmedic.datasets.text import TextDataset, load_tokenizer
from vilmedic.datasets.transforms import crop_square, resize_short_side
from vilmedic.datasets.vocabulary import run_vocabulary
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.executors.checkpoint import load_checkpoint, load_weights
from vilmedic.registry import MODELS

KEY = "ensemblor.rerank.ckpt"


class Reranker:
    """Scores images by the cosine similarity of their embedding and that of the report.

    The model, its tokenizer and the preparation of its images are those of the run that wrote the
    checkpoint; the data of that run are not needed.

    Args:
        ckpt: path of the checkpoint, in its run directory.
        device: where to compute.

    Raises:
        ConfigError: the checkpoint is not one of ConVIRT.
        CheckpointError: it is missing, damaged or does not say how it was made.
    """

    def __init__(self, ckpt: str, device: torch.device) -> None:
        path = Path(ckpt)
        state = load_checkpoint(path)
        config = state.get("config") or {}
        if "model" not in config or "dataset" not in config:
            raise CheckpointError(f"{KEY}: {path} does not hold the configuration of its run.")
        proto = config["model"].get("proto")
        if proto != "ConVIRT":
            raise ConfigError(f"{KEY}: {path} is a checkpoint of {proto}; allowed: ConVIRT.")
        sections = config["dataset"]
        if "seq" not in sections or "image" not in sections:
            raise ConfigError(f"{KEY}: {path} was not trained on images and reports.")
        self.text = _with_defaults(TextDataset, sections["seq"])
        self.image = _with_defaults(ImageDataset, sections["image"])
        self.tokenizer = self._tokenizer(path.parent)
        spec = DataSpec(tokenizer=self.tokenizer, tokenizer_max_len=self.text["tokenizer_max_len"])
        self.device = device
        self.model = build(MODELS, config["model"], spec=spec, filled=True)
        load_weights(self.model, state, path)
        self.model.to(device).eval()

    @torch.inference_mode()
    def scores(self, report: str, images: Tensor) -> list[float]:
        """The agreement of images with a report, -1 to 1 each.

        Args:
            report: the text.
            images: [B, 1 or 3, H, W] in 0..1.
        """
        clean = CLEANERS[self.text["processing"]] if self.text["processing"] else str
        encoded = self.tokenizer(
            [clean(report)],
            truncation=True,
            max_length=self.text["tokenizer_max_len"],
            return_tensors="pt",
        )
        batch = {key: encoded[key].to(self.device) for key in ("input_ids", "attention_mask")}
        wanted = self.model.encode_text(batch)["linguistic"].float()
        found = self.model.encode({"images": self._prepare(images)})["visual"].float()
        agreement: list[float] = functional.cosine_similarity(found, wanted).tolist()
        return agreement

    def _prepare(self, images: Tensor) -> Tensor:
        pixels = (images.to(self.device) * 255).round().to(torch.uint8)
        if self.image["color"] == "grey":
            pixels = pixels.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
        size, crop = self.image["resize"], self.image["crop"]
        if size is not None:
            pixels = resize_short_side(pixels, size)
        if crop is not None:
            pixels = crop_square(pixels, crop, random=False)
        mean, std = (
            torch.tensor(self.image[name], device=self.device).view(1, -1, 1, 1)
            for name in ("mean", "std")
        )
        normalised = (pixels.float() / 255 - mean) / std
        return normalised.expand(-1, 3, -1, -1)

    def _tokenizer(self, run_dir: Path) -> Any:
        if self.text["tokenizer"] is not None:
            try:
                return load_tokenizer(self.text["tokenizer"])
            except ValueError as error:
                raise ConfigError(f"{KEY}: {error}") from error
        return run_vocabulary(
            run_dir,
            None,
            processing=self.text["processing"],
            min_frequency=self.text["vocab_min_frequency"],
        )


def _with_defaults(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor, with its defaults where they are not given."""
    parameters = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in parameters} | given
