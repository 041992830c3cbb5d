"""Pictures of where each word of a report looks in its X-ray."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import torch

from vilmedic.config.types import AtLeast, UsedWith
from vilmedic.datasets.image import image_part
from vilmedic.errors import ConfigError
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.post_processing.contract import PostProcessing
from vilmedic.post_processing.heat_maps import Sample, draw_heat_maps

logger = logging.getLogger(__name__)


class PlotAttention(PostProcessing):
    """Heat maps of the words of reports over their X-rays, `<split>_attention_<sample>.png`.

    Attention is what the model compares a word with: the regions of the image that stand for it.
    Punctuation is left out; the first map is that of the opening special token, which stands for
    the report. An ensemble shows the mean of its maps.

    Args:
        num_samples: how many samples to draw, from the first of the split on.
        samples: the samples to draw instead, counted from 0, so that sample i is line i + 1.
    """

    def __init__(
        self,
        *,
        num_samples: Annotated[int, UsedWith("samples", (None,)), AtLeast(1)] = 4,
        samples: list[Annotated[int, AtLeast(0)]] | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.samples = samples

    def check(self, evaluation: Evaluation) -> None:
        """Refuse a model without words and regions, and samples that the split does not have."""
        evaluation.check_local("plot_attention")
        size = len(evaluation.dataset)
        missing = [number for number in self.samples or () if not 0 <= number < size]
        if missing:
            raise ConfigError(
                f"plot_attention.samples: given {missing[0]}, but the split '{evaluation.split}' "
                f"has {size} samples. Allowed: 0 to {size - 1}."
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
        files = []
        for index, attention in zip(chosen, maps, strict=True):
            description = evaluation.dataset.describe(index)
            if not torch.isfinite(attention).all():
                logger.warning("plot_attention: the maps of sample %d are not finite.", index)
                continue
            words = evaluation.dataset.words(description["report"])[: len(attention)]
            drawn = [n for n, word in enumerate(words) if any(c.isalnum() for c in word)]
            picture, window = images.picture(evaluation.dataset, index)
            sample = Sample(
                picture=picture,
                window=window,
                report=description["report"],
                words=[words[n] for n in drawn],
                attention=attention[drawn],
            )
            path = evaluation.out_dir / f"{evaluation.split}_attention_{index}.png"
            [line] = evaluation.line_numbers([index])
            labels = ", ".join(description.get("labels", ()))
            draw_heat_maps(
                path,
                sample,
                title=f"{evaluation.split}, line {line}" + (f": {labels}" if labels else ""),
                caption=evaluation.title,
            )
            files.append(path)
        return files
