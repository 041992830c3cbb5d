"""Retrieval: does an image find its own report among all, and a report its image?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.executors.evaluation import Evaluation
from vilmedic.metrics.contract import Metric

# Similarities closer than this are one: a sum of products rounds differently by its place.
TIE = 1e-9
RECALLS = (1, 5, 10)
Block = Callable[[slice, slice], Tensor]


class Retrieval(Metric):
    """Image-to-text and text-to-image recall at 1, 5 and 10, and the median rank.

    The candidates are all samples of the split, so numbers of splits of different size do not
    compare. The protocol is strict: only the text of its own pair is right for an image, even
    where another sample has the same report word for word. Ties are broken fairly: with g
    candidates above the true one and t beside it, the rank is 1 + g + t / 2 and the recall at k
    is min(1, max(0, (k - g) / (t + 1))), the mean over all orders of the tied. Embeddings that
    are all alike therefore score chance, k / N.

    Models that compare words with regions (GLoRIA) can be asked for that similarity instead of the
    cosine of the whole image and the whole report, or for the mean of the two.

    Args:
        similarity: what ranks the candidates: global (whole image, whole report), local (regions,
            words) or both, the mean of the two.
        local_aggregation: how the words of a report count together in the local similarity: max,
            as published evaluations have it, or sum, as in training.
        block_size: similarities are computed in squares of this many samples a side.
    """

    numbers: ClassVar = {
        "image_to_text_r1": "higher",
        "image_to_text_r5": "higher",
        "image_to_text_r10": "higher",
        "image_to_text_median_rank": "lower",
        "text_to_image_r1": "higher",
        "text_to_image_r5": "higher",
        "text_to_image_r10": "higher",
        "text_to_image_median_rank": "lower",
    }

    def __init__(
        self,
        *,
        similarity: Literal["global", "local", "both"] = "global",
        local_aggregation: Literal["sum", "max"] = "max",
        block_size: int = 1024,
    ) -> None:
        self.similarity = similarity
        self.local_aggregation = local_aggregation
        self.block_size = block_size

    def check(self, evaluation: Evaluation) -> None:
        """Refuse a local similarity that the model does not have."""
        if self.similarity != "global":
            evaluation.check_local(f"retrieval.similarity: given {self.similarity}")

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`{image_to_text,text_to_image}_{r1,r5,r10,median_rank}`.

        All are None for features without images or without texts.
        """
        compare = self._similarities(evaluation)
        count = len(evaluation.features)
        results: dict[str, Any] = {}
        for direction in ("image_to_text", "text_to_image"):
            if compare is None:
                results |= {f"{direction}_r{k}": None for k in RECALLS}
                results[f"{direction}_median_rank"] = None
                continue
            block = compare if direction == "image_to_text" else transposed(compare)
            above, beside = count_ahead(block, count, block_size=self.block_size)
            for k in RECALLS:
                recall = ((k - above) / (beside + 1)).clamp(0, 1).mean()
                results[f"{direction}_r{k}"] = recall.item()
            ranks = 1 + above + beside / 2
            results[f"{direction}_median_rank"] = torch.quantile(ranks, 0.5).item()
        return results

    def _similarities(self, evaluation: Evaluation) -> Block | None:
        """The similarity of images and reports, block by block; None without either."""
        visual, linguistic = evaluation.feature("visual"), evaluation.feature("linguistic")
        if visual is None or linguistic is None:
            return None
        whole = cosines(visual, linguistic)
        if self.similarity == "global":
            return whole
        reports = [evaluation.dataset.describe(int(i))["report"] for i in evaluation.features.index]
        local = evaluation.local_similarity(reports, self.local_aggregation)
        if local is None:
            return None
        if self.similarity == "local":
            return lambda rows, columns: local[rows, columns].double()
        return lambda rows, columns: (whole(rows, columns) + local[rows, columns].double()) / 2


def cosines(images: Tensor, reports: Tensor) -> Block:
    """Cosine similarities [R, C] of slices of two sets of embeddings [N, D], in float64."""
    images = functional.normalize(images.double(), dim=1)
    reports = functional.normalize(reports.double(), dim=1)
    return lambda rows, columns: images[rows] @ reports[columns].T


def transposed(block: Block) -> Block:
    """The same similarities with the parts of queries and targets exchanged."""
    return lambda rows, columns: block(columns, rows).T


def count_ahead(block: Block, count: int, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Count the candidates that rank above and beside the true one.

    Args:
        block: gives the similarities of a slice of the queries and a slice of the targets; query
            i belongs to target i.
        count: N, the number of queries and of targets.
        block_size: side of the squares of similarities that are held at a time.

    Returns:
        Two float64 tensors [N]: how many targets are more similar to the query than its own, and
        how many others are equally similar.
    """
    above, beside = torch.zeros(2, count, dtype=torch.float64)
    slices = [slice(start, start + block_size) for start in range(0, count, block_size)]
    for rows in slices:
        own = block(rows, rows).diagonal().unsqueeze(1)
        for columns in slices:
            lead = block(rows, columns) - own
            above[rows] += (lead > TIE).sum(dim=1)
            beside[rows] += (lead.abs() <= TIE).sum(dim=1)
    return above, beside - 1
