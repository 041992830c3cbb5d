"""Attention heat maps of report words over the X-ray."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vilmedic.config.types import AtLeast, UsedWith
from vilmedic.datasets.image import Window, image_part
from vilmedic.drawing.colours import label_colour
from vilmedic.errors import ArgumentError
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.log import counted
from vilmedic.metrics.pointing_game import Box, Finding, read_findings
from vilmedic.post_processing.contract import PostProcessing

logger = logging.getLogger(__name__)

COLUMNS = 6
GRID = 8.1  # inches that all heat maps of a row take
HEAD = 0.26  # inches for the word over it
SIDE = 3.6  # inches across the X-ray
LONG_SIDE = 320  # pixels of a heat map
COLOURS = "inferno"


class PlotAttention(PostProcessing):
    """Heat maps of the words of reports over their X-rays, `<split>_attention_<sample>.png`.

    Attention is what the model compares a word with: the regions of the image that stand for it.
    Punctuation and special tokens are left out. Where the data say where findings are, their boxes
    are drawn. An ensemble shows the mean of its maps.

    Args:
        num_samples: how many samples to draw, from the first of the split on.
        samples: the samples to draw instead, counted from 0, so that sample i is line i + 1.
        root: folder of the files that say where findings are, as `pointing_game` reads them; null
            takes the folder of the split's other files, where there may be none.
        file: name of these files after the split.
    """

    def __init__(
        self,
        *,
        num_samples: Annotated[int, UsedWith("samples", (None,)), AtLeast(1)] = 4,
        samples: list[Annotated[int, AtLeast(0)]] | None = None,
        root: str | None = None,
        file: str = "finding.jsonl",
    ) -> None:
        self.num_samples = num_samples
        self.samples = samples
        self.root = root
        self.file = file

    def check(self, evaluation: Evaluation) -> None:
        """Refuse a model without words and regions, and samples that the split does not have.

        The places of findings are read, so that what is wrong with them is known as well.
        """
        evaluation.check_local()
        self._findings(evaluation)
        size = len(evaluation.dataset)
        missing = [number for number in self.samples or () if not 0 <= number < size]
        if missing:
            raise ArgumentError(
                {
                    "samples": f"given {missing[0]}, but the split '{evaluation.split}' "
                    f"has {counted(size, 'sample')}. Allowed: integer from 0 to {size - 1}."
                }
            )

    def __call__(self, evaluation: Evaluation) -> list[Path]:
        """Draw the samples of a split."""
        first = evaluation.features.index[: self.num_samples].tolist()
        chosen = first if self.samples is None else list(dict.fromkeys(self.samples))
        maps = evaluation.attention(chosen)
        if maps is None:
            logger.warning(
                "plot_attention: no words or no regions on the split '%s', so nothing is drawn.",
                evaluation.split,
            )
            return []
        images = image_part(evaluation.dataset)
        special = set(evaluation.dataset.spec.tokenizer.all_special_tokens)
        findings = self._findings(evaluation)
        names = list(evaluation.features.label_names)
        files = []
        for index, attention in zip(chosen, maps, strict=True):
            description = evaluation.dataset.describe(index)
            if not torch.isfinite(attention).all():
                logger.warning("plot_attention: the maps of sample %d are not finite.", index)
                continue
            words = evaluation.dataset.words(description["report"])[: len(attention)]
            drawn = [
                n
                for n, word in enumerate(words)
                if word not in special and any(c.isalnum() for c in word)
            ]
            if not drawn:
                logger.warning("plot_attention: the report of sample %d has no words.", index)
                continue
            image, window = images.original(evaluation.dataset, index)
            [line] = evaluation.line_numbers([index])
            sample = Sample(
                image=image,
                window=window,
                report=description["report"],
                words=[words[n] for n in drawn],
                attention=attention[drawn],
                boxes=[
                    (finding.name, box, _colour(finding.name, names))
                    for finding in (findings[line - 1] if line <= len(findings) else ())
                    for box in finding.boxes
                ],
            )
            path = evaluation.out_dir / f"{evaluation.split}_attention_{index}.png"
            labels = ", ".join(description.get("labels", ()))
            where = f"{evaluation.data}, {evaluation.split} split, line {line}"
            draw_heat_maps(
                path,
                sample,
                title=f"Where words look: {where}" + (f": {labels}" if labels else ""),
                caption=evaluation.title + ("; boxes: where findings are" if sample.boxes else ""),
            )
            files.append(path)
        return files

    def _findings(self, evaluation: Evaluation) -> list[list[Finding]]:
        """The findings of each line of the split; none where the data do not say them."""
        root = self.root
        if root is None:
            where = evaluation.dataset.lines([0])[0].rpartition(":")[0]
            root = str(Path(where).parent)
            if not (Path(root) / f"{evaluation.split}.{self.file}").is_file():
                return []
        return read_findings(root, evaluation.split, self.file)


@dataclass(frozen=True)
class Sample:
    """Data of one sample for its figure.

    Args:
        image: the X-ray, uint8 [C, H, W].
        window: the part of it that the model saw.
        report: its text.
        words: the words of the report.
        attention: a map for each of them, [L, h, w], each adding up to 1.
        boxes: where findings are: name, box as shares of the image, and colour.
    """

    image: Tensor
    window: Window
    report: str
    words: Sequence[str]
    attention: Tensor
    boxes: Sequence[tuple[str, Box, str]] = ()


@rc_context({"text.parse_math": False})  # a report may hold dollar signs
def draw_heat_maps(path: Path, sample: Sample, *, title: str, caption: str) -> None:
    """Draw an X-ray with its report, and beside them the X-ray under the heat map of each word.

    All maps share one scale, in multiples of even attention, so that a word which looks nowhere in
    particular stays dark.

    Args:
        path: the PNG file to write.
        sample: what to draw.
        title: which sample it is.
        caption: where it comes from, in small print.
    """
    height, width = sample.image.shape[-2:]
    aspect = height / width
    text = textwrap.wrap(sample.report, 52)
    side_height = SIDE * aspect + 0.35 + 0.165 * len(text)
    columns, panel = arranged(len(sample.words), aspect, side_height)
    rows = _rows(len(sample.words), columns)
    row_height = panel * aspect + HEAD
    inches = max(rows * row_height, side_height) + 0.75
    across = SIDE + columns * panel + 1.3
    figure = Figure(figsize=(across, inches))
    FigureCanvasAgg(figure)

    def place(left: float, top: float, wide: float, high: float) -> Any:
        """Return axes at a position in inches from the upper left corner."""
        box = (left / across, 1 - (top + high) / inches, wide / across, high / inches)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        return axes

    figure.text(0.15 / across, 1 - 0.28 / inches, title, fontsize=12, fontweight="bold")
    figure.text(0.15 / across, 1 - 0.50 / inches, caption, fontsize=8.5, color="#444444")
    grey = _grey(sample.image)
    axes = place(0.15, 0.65, SIDE, SIDE * aspect)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, aspect="auto")
    if sample.window != (0.0, 0.0, 1.0, 1.0):
        axes.add_patch(_frame(sample.window, width, height))
    for name, box, colour in sample.boxes:
        axes.add_patch(_frame(box, width, height, colour=colour, style="-"))
        corner = (box[0] * width, box[1] * height)
        plate = {"facecolor": colour, "edgecolor": "none", "pad": 1.2}
        look: dict[str, Any] = {"fontsize": 7.5, "color": "white", "bbox": plate}
        axes.annotate(name, corner, xytext=(1, 3), textcoords="offset points", **look)
    figure.text(
        0.15 / across,
        1 - (0.65 + SIDE * aspect + 0.15) / inches,
        "\n".join(text),
        fontsize=8.5,
        linespacing=1.35,
        va="top",
    )

    times_even = sample.attention * sample.attention[0].numel()
    peak = max(2.0, float(times_even.max()))
    shown = _shrink(grey)
    for number, word in enumerate(sample.words):
        row, column = divmod(number, columns)
        left, top = SIDE + 0.4 + column * panel, 0.65 + row * row_height
        axes = place(left, top + 0.2, panel - 0.08, (panel - 0.08) * aspect)
        axes.imshow(overlay(shown, times_even[number], sample.window, peak), aspect="auto")
        axes.set_title(_short(word), fontsize=9, pad=3)
        for _, box, colour in sample.boxes:
            axes.add_patch(_frame(box, *shown.shape[::-1], colour=colour, style="-"))

    left = SIDE + 0.5 + columns * panel
    bar = figure.add_axes(
        (
            left / across,
            1 - (0.85 + min(3.0, inches - 1.1)) / inches,
            0.13 / across,
            min(3.0, inches - 1.1) / inches,
        )
    )
    scale = ScalarMappable(Normalize(0, peak), COLOURS)
    figure.colorbar(scale, cax=bar).set_label("attention, 1 = even", fontsize=8)
    bar.tick_params(labelsize=8)
    figure.savefig(path, dpi=150)


def overlay(
    grey: NDArray[np.float32], attention: Tensor, window: Window, peak: float
) -> NDArray[np.float32]:
    """The image tinted by a map of its window: [H, W, 3]; outside the window it is faint."""
    height, width = grey.shape
    left, right = round(window[0] * width), max(round(window[2] * width), 1)
    top, bottom = round(window[1] * height), max(round(window[3] * height), 1)
    size = (bottom - top, right - left)
    smooth = functional.interpolate(
        attention[None, None].float(), size=size, mode="bilinear", align_corners=False
    )
    heat = (smooth[0, 0] / peak).clamp(0, 1).numpy()
    tinted = np.repeat(grey[:, :, None] * 0.35, 3, axis=2)
    colours = colormaps[COLOURS](heat)[:, :, :3]
    strength = 0.25 + 0.5 * heat[:, :, None]
    inside = grey[top:bottom, left:right, None]
    tinted[top:bottom, left:right] = inside * (1 - strength) + colours * strength
    return tinted.clip(0, 1)


def _grey(image: Tensor) -> NDArray[np.float32]:
    grey: NDArray[np.float32] = (image.float().mean(dim=0) / 255).numpy()
    return grey


def _shrink(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """The image in as many pixels as a small panel can show."""
    step = max(1, max(grey.shape) // LONG_SIDE)
    return grey[::step, ::step]


def arranged(words: int, aspect: float, height: float) -> tuple[int, float]:
    """Layout of heat maps: as large as possible at the height of the X-ray.

    Args:
        words: how many there are.
        aspect: height of a map over its width.
        height: inches of the X-ray and the report, which the maps stand beside.

    Returns:
        Maps in a row, and inches across each. Those of many words run on below the X-ray.
    """
    columns = next(
        (c for c in range(1, COLUMNS) if _rows(words, c) * (GRID / c * aspect + HEAD) <= height),
        COLUMNS,
    )
    rows = _rows(words, columns)
    columns = _rows(words, rows)  # as many in a row as leave the last one fullest
    highest = max(height, rows * (GRID / COLUMNS * aspect + HEAD))
    return columns, min(GRID / columns, (highest / rows - HEAD) / aspect)


def _rows(words: int, columns: int) -> int:
    return -(-words // columns)


def _colour(finding: str, labels: Sequence[str]) -> str:
    """The colour of a finding: that of its label."""
    return label_colour(labels.index(finding) if finding in labels else len(labels))


def _frame(
    window: Window, width: int, height: int, *, colour: str = "#E69F00", style: str = "--"
) -> Rectangle:
    left, top, right, bottom = window
    corner = (left * width - 0.5, top * height - 0.5)
    size = ((right - left) * width, (bottom - top) * height)
    halo = [Stroke(linewidth=2.6, foreground="black", alpha=0.7), Normal()]
    look: dict[str, Any] = {"fill": False, "linewidth": 1.3, "path_effects": halo}
    return Rectangle(corner, *size, edgecolor=colour, linestyle=style, **look)


def _short(word: str) -> str:
    return word if len(word) <= 16 else f"{word[:15]}\u2026"
