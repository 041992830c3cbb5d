"""Originals and reconstructions of a discrete VAE, side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vilmedic.config.types import Between
from vilmedic.datasets.aligned import SampleKey
from vilmedic.device import inference, move
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.evaluation.features import evaluating
from vilmedic.metrics.reconstruction import check_single_vae
from vilmedic.post_processing.contract import PostProcessing

PAIRS_A_ROW = 4
SIDE = 128  # smaller images are enlarged by a whole number, so that pixels stay as they are
GAP = 16
HEAD = 48
INK, PAPER = (34, 34, 34), (255, 255, 255)


class PlotReconstruction(PostProcessing):
    """Draws `<split>_reconstruction.png`: images, each beside its reconstruction.

    Reconstructions are made of the likeliest codes, as generated images will be. The samples are
    spread evenly over the split and the same in every evaluation.

    Args:
        num_samples: number of images.
    """

    def __init__(self, *, num_samples: Annotated[int, Between(1, 10000)] = 8) -> None:
        self.num_samples = num_samples

    def check(self, evaluation: Evaluation) -> None:
        """Refuse models without codes, and several models at once."""
        check_single_vae(evaluation)

    def __call__(self, evaluation: Evaluation) -> list[Path]:
        """Draw the figure of a split."""
        dataset, networks = evaluation.dataset, evaluation.networks
        count = min(self.num_samples, len(dataset))
        chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
        batch = dataset.collate([dataset[SampleKey(index)] for index in chosen])
        model = networks.members[0]()
        with (
            evaluating(model),
            inference(networks.device, networks.precision),
        ):
            images = dataset.prepare(move(batch, networks.device))["images"]
            made = model.reconstruct(images)
        lines = evaluation.line_numbers(chosen)
        path = evaluation.out_dir / f"{evaluation.split}_reconstruction.png"
        title = f"Reconstructions of {evaluation.data}, {evaluation.split} split"
        draw_pairs(path, images, made, lines, title=title, caption=evaluation.title)
        return [path]


def draw_pairs(
    path: Path, originals: Tensor, made: Tensor, lines: list[int], *, title: str, caption: str
) -> None:
    """Draw images beside their reconstructions, pixel by pixel.

    Args:
        path: the PNG file to write.
        originals: in 0..1, [B, C, H, W].
        made: in 0..1, of the same size; one channel is grey.
        lines: the line number of each image in the files of its split.
        title: what they are.
        caption: where they come from, in small print.
    """
    left, right = _pixels(originals), _pixels(made)
    height, width = left.shape[1:3]
    across, down = 2 * width + GAP, height + GAP + 14
    columns = min(PAIRS_A_ROW, len(left))
    rows = math.ceil(len(left) / columns)
    small, large = ImageFont.load_default(11), ImageFont.load_default(14)
    caption = f"{caption}; left: original, right: reconstruction"
    texts = max(large.getlength(title), small.getlength(caption))
    width = max(GAP + columns * across, math.ceil(texts) + 2 * GAP)
    sheet = Image.new("RGB", (width, HEAD + rows * down), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 6), title, INK, large)
    draw.text((GAP, 26), caption, INK, small)
    for number, pair in enumerate(zip(left, right, strict=True)):
        row, column = divmod(number, columns)
        x, y = GAP + column * across, HEAD + row * down
        sheet.paste(Image.fromarray(np.concatenate(pair, axis=1)), (x, y))
        draw.text((x, y + height + 2), f"line {lines[number]}", INK, small)
    sheet.save(path)


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """Images as uint8 [B, H, W, 3], enlarged by a whole number when they are small."""
    times = max(1, SIDE // images.shape[-1])
    levels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    levels = levels.expand(-1, 3, -1, -1) if levels.shape[1] == 1 else levels[:, :3]
    large = levels.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    pixels: NDArray[np.uint8] = large.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels
