"""Retrieval between images and reports: recall at k, precision at k and median rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.compiled import compiled
from vilmedic.config.types import Between, UsedWith
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.log import Progress
from vilmedic.metrics.contract import Metric

logger = logging.getLogger(__name__)

# Similarities closer than this are one: a sum of products rounds differently by its place.
TIE = 1e-9
RECALLS = (1, 5, 10)
TILE = (512, 512)
"""Images and reports that a CPU compares at once, so that all of it stays in its cache."""
SCORES = 1 << 24
"""Similarities held at a time where whole rows of them are looked at."""
DIRECTIONS = ("image_to_text", "text_to_image")
Rule = Literal["strict", "same_text", "same_labels"]


class Leads(NamedTuple):
    """By how much reports are more similar to images than the images' own.

    Args:
        own: similarity of each image and its own report, float64 [N].
        write: writes the leads of a slice of the images and a slice of the reports into a tensor
            [R, C]: similarities less the own one of each image.
    """

    own: Tensor
    write: Callable[[slice, slice, Tensor], object]


class Retrieval(Metric):
    """Image-to-text and text-to-image recall at 1, 5 and 10, and the median rank.

    The candidates are all samples of the split, so numbers of splits of different size do not
    compare. The protocol is strict: only the text of its own pair is right for an image, even
    where another sample has the same report word for word. Ties are broken fairly: with g
    candidates above the true one and t beside it, the rank is 1 + g + t / 2 and the recall at k
    is min(1, max(0, (k - g) / (t + 1))), the mean over all orders of the tied. Embeddings that
    are all alike therefore score chance, k / N. Reports that are equal word for word are ties,
    and so are samples with the same image files.

    Similarities are computed in float64 in blocks, each of them once for both directions, on the
    GPU of the evaluation if there is one.

    Models that compare words with regions (GLoRIA) can be asked for that similarity instead of the
    cosine of the whole image and the whole report, or for the mean of the two.

    Other rules than the strict one can be measured beside it, on the same candidates: with
    same_text every report that is equal word for word is right, with same_labels every sample with
    the same set of labels. The rank is then that of the first right candidate, and recall at k the
    share of queries with one among the first k, again the mean over all orders of the tied.

    The precision at k is the share of the first k candidates that have the query's set of labels,
    the mean over all queries, the own pair included (Zhang et al. 2020, Huang et al. 2021). Those
    tied for the last places count with the share of them that has a place.

    Args:
        positives: which candidates are right for a query: strict, same_text, same_labels, or a
            list of these. Numbers of the strict rule have no prefix.
        precision_at: numbers of candidates of which the precision is measured, such as 5, 10 and
            100; needs labels.
        similarity: what ranks the candidates: global (whole image, whole report), local (regions,
            words) or both, the mean of the two.
        local_aggregation: how the words of a report count together in the local similarity: max,
            the best word without the opening special token, as published evaluations have it, or
            sum, over all words and that token, as in training.
        block_size: similarities are held in blocks of at most this many samples a side.
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
        "same_*_r1": "higher",
        "same_*_r5": "higher",
        "same_*_r10": "higher",
        "same_*_median_rank": "lower",
        "image_to_text_p*": "higher",
        "text_to_image_p*": "higher",
    }

    def __init__(
        self,
        *,
        positives: Rule | list[Rule] = "strict",
        precision_at: list[Annotated[int, Between(1, 1048576)]] = [],  # noqa: B006
        similarity: Literal["global", "local", "both"] = "global",
        local_aggregation: Annotated[
            Literal["sum", "max"], UsedWith("similarity", ("local", "both"))
        ] = "max",
        block_size: Annotated[int, Between(1, 16384)] = 1024,
    ) -> None:
        self.positives = positives
        self.precision_at = precision_at
        self.similarity = similarity
        self.local_aggregation = local_aggregation
        self.block_size = block_size

    def check(self, evaluation: Evaluation) -> None:
        """Refuse a local similarity that the model does not have."""
        if self.similarity != "global":
            evaluation.check_local("similarity", self.similarity)

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`{image_to_text,text_to_image}_{r1,r5,r10,median_rank}`.

        With `same_text_` or `same_labels_` in front for these rules, and `_p5` and so on for the
        precision. All are None for features without images or without texts, and those that need
        labels where there are none.
        """
        rules = [self.positives] if isinstance(self.positives, str) else self.positives
        leads = self._leads(evaluation)
        results: dict[str, Any] = {}
        if "strict" in rules:
            results |= self._strict(evaluation, leads)
        names: list[str | None] = [rule for rule in rules if rule != "strict"]
        for rule in dict.fromkeys(names + ([None] if self.precision_at else [])):
            alike = None if leads is None else _alike(evaluation, rule or "same_labels")
            for direction in DIRECTIONS:
                if rule is None:
                    ks = list(dict.fromkeys(self.precision_at))
                    values = dict.fromkeys((f"p{k}" for k in ks), None)
                    if leads is not None and alike is not None:
                        values = _precision(self._rows(leads, direction), alike, ks)
                else:
                    values = dict.fromkeys([*(f"r{k}" for k in RECALLS), "median_rank"], None)
                    if leads is not None and alike is not None:
                        values = _first_right(self._rows(leads, direction), alike)
                prefix = f"{rule}_" if rule else ""
                results |= {f"{prefix}{direction}_{key}": v for key, v in values.items()}
        return results

    def _rows(self, leads: Leads, direction: str) -> Iterator[tuple[slice, Tensor]]:
        """The similarities of some queries with all candidates, on the CPU, block by block.

        They are less a number that is one for each query, which ranks nothing.
        """
        count = len(leads.own)
        every = slice(0, count)
        size = max(1, min(self.block_size, SCORES // count))
        for some in _slices(count, size):
            length = some.stop - some.start
            if direction == "image_to_text":
                lead = leads.own.new_empty(length, count)
                leads.write(some, every, lead)
                yield some, lead.cpu()
            else:
                lead = leads.own.new_empty(count, length)
                leads.write(every, some, lead)
                yield some, lead.add_(leads.own[:, None]).T.cpu()

    def _strict(self, evaluation: Evaluation, leads: Leads | None) -> dict[str, Any]:
        """Recall and rank of the own pair alone."""
        results: dict[str, Any] = {}
        counts = None
        if leads is not None:
            counts = count_ahead(leads, block_size=self.block_size)
        for direction in DIRECTIONS:
            if counts is None:
                results |= {f"{direction}_r{k}": None for k in RECALLS}
                results[f"{direction}_median_rank"] = None
                continue
            above, beside = counts[direction]
            evaluation.record(
                **{
                    f"{direction}_above": above.long().numpy(),
                    f"{direction}_beside": beside.long().numpy(),
                }
            )
            for k in RECALLS:
                recall = ((k - above) / (beside + 1)).clamp(0, 1).mean()
                results[f"{direction}_r{k}"] = recall.item()
            ranks = 1 + above + beside / 2
            results[f"{direction}_median_rank"] = torch.quantile(ranks, 0.5).item()
        return results

    def _leads(self, evaluation: Evaluation) -> Leads | None:
        """How images and reports compare; None without either."""
        visual, linguistic = evaluation.feature("visual"), evaluation.feature("linguistic")
        if visual is None or linguistic is None:
            return None
        images, texts = evaluation.repeats("image"), evaluation.repeats("report")
        device = evaluation.device
        whole = cosines(visual[images], linguistic[texts], device)
        if self.similarity == "global":
            return whole
        reports = [evaluation.dataset.describe(int(i))["report"] for i in evaluation.features.index]
        local = evaluation.local_similarity(reports, self.local_aggregation)
        if local is None:
            return None
        own = local[images, torch.arange(len(local))].to(device, torch.float64)

        def write(rows: slice, columns: slice, out: Tensor) -> Tensor:
            return out.copy_(local[images[rows], columns]).sub_(own[rows, None])

        def write_mean(rows: slice, columns: slice, out: Tensor) -> Tensor:
            whole.write(rows, columns, out)
            part = local[images[rows], columns].to(out)
            return out.add_(part.sub_(own[rows, None])).div_(2)

        if self.similarity == "local":
            return Leads(own, write)
        return Leads((whole.own + own) / 2, write_mean)


def _alike(evaluation: Evaluation, rule: str) -> Tensor | None:
    """A number for each sample, equal for samples that are right for each other: int64 [N].

    Returns:
        None without labels, for a rule that needs them.
    """
    if rule == "same_text":
        return evaluation.repeats("report")
    features = evaluation.features
    if features.labels is None:
        logger.warning(
            "retrieval: no labels on the split '%s', so what needs them is null. Add %s",
            evaluation.split,
            LABEL_OVERRIDES,
        )
        return None
    starts, columns = features.labels.indptr, features.labels.indices
    first: dict[tuple[int, ...], int] = {}
    rows = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    sets = (tuple(sorted(columns[start:end].tolist())) for start, end in rows)
    return torch.tensor([first.setdefault(one, place) for place, one in enumerate(sets)])


def _precision(
    rows: Iterator[tuple[slice, Tensor]], alike: Tensor, ks: list[int]
) -> dict[str, Any]:
    """The precision at each k, the mean over queries; None for more candidates than there are."""
    total = dict.fromkeys(ks, 0.0)
    for some, similarity in rows:
        right = alike[some, None] == alike
        for k in ks:
            if k > len(alike):
                continue
            last = similarity.topk(k, dim=1).values[:, -1:]
            nearer, tied = similarity > last + TIE, (similarity - last).abs() <= TIE
            left = (k - nearer.sum(dim=1)).double() / tied.sum(dim=1)
            found = (nearer & right).sum(dim=1) + left * (tied & right).sum(dim=1)
            total[k] += float(found.sum()) / k
    return {f"p{k}": None if k > len(alike) else total[k] / len(alike) for k in ks}


def _first_right(rows: Iterator[tuple[slice, Tensor]], alike: Tensor) -> dict[str, Any]:
    """Recalls and the median rank of the first right candidate.

    With g candidates above it, of which none is right, and m right and t wrong ones that share its
    similarity, the expected rank is 1 + g + t / (m + 1), and the chance that none of the right ones
    is among the first j of the tied is that of drawing j wrong ones.
    """
    recalls: dict[int, list[Tensor]] = {k: [] for k in RECALLS}
    ranks = []
    for some, similarity in rows:
        right = alike[some, None] == alike
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        above = (similarity > best + TIE).sum(dim=1).double()
        tied = (similarity - best).abs() <= TIE
        found = (tied & right).sum(dim=1).double()
        wrong = (tied & ~right).sum(dim=1).double()
        ranks.append(1 + above + wrong / (found + 1))
        for k in RECALLS:
            missed = torch.ones_like(above)
            for draw in range(k):
                drawn = draw < (k - above)
                left = ((wrong - draw) / (wrong + found - draw).clamp(min=1)).clamp(min=0)
                missed = torch.where(drawn, missed * left, missed)
            recalls[k].append(1 - missed)
    results: dict[str, Any] = {f"r{k}": torch.cat(recalls[k]).mean().item() for k in RECALLS}
    return results | {"median_rank": torch.quantile(torch.cat(ranks), 0.5).item()}


def cosines(images: Tensor, reports: Tensor, device: torch.device | None = None) -> Leads:
    """Leads by the cosine similarity of two sets of embeddings [N, D], in float64.

    Args:
        images: [N, D].
        reports: [N, D]; report i belongs to image i.
        device: where they are compared.
    """
    images, reports = (
        functional.normalize(x.to(device, torch.float64), dim=1) for x in (images, reports)
    )
    own = (images * reports).sum(dim=1)
    # One more column subtracts the own similarity in the product itself.
    queries = torch.cat([images, own[:, None]], dim=1)
    targets = torch.cat([reports, own.new_full((len(own), 1), -1.0)], dim=1).T

    def write(rows: slice, columns: slice, out: Tensor) -> Tensor:
        return torch.mm(queries[rows], targets[:, columns], out=out)

    return Leads(own, write)


def count_ahead(leads: Leads, *, block_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Count the candidates that rank above and beside the true one, in both directions.

    Every similarity is computed once and compared with that of the pair in its row and of the pair
    in its column. On a CPU each thread compares a tile at a time, which fits into its cache.

    Args:
        leads: of all images and reports.
        block_size: largest side of the blocks of similarities.

    Returns:
        For `image_to_text` and `text_to_image` two float64 tensors [N]: how many targets are more
        similar to the query than its own, and how many others are equally similar.
    """
    own, write = leads
    count, on_cpu = len(own), own.device.type == "cpu"
    sides = TILE if on_cpu else (block_size, block_size)
    height, width = (min(block_size, side, count) for side in sides)
    parts = _slices(count, width)

    compare = _compare_on_cpu if on_cpu else _compare

    def strip(rows: slice) -> tuple[slice, Tensor, Tensor]:
        """Counts [2, R] of the images of a strip, and what it adds to those of all reports."""
        images = rows.stop - rows.start
        held = own.new_empty(images * width)
        of_rows = torch.zeros(2, images, dtype=torch.int64, device=own.device)
        of_columns = torch.zeros(2, count, dtype=torch.int64, device=own.device)
        for columns in parts:
            reports = columns.stop - columns.start
            lead = held[: images * reports].view(images, reports)
            write(rows, columns, lead)
            compare(lead, own[rows], own[columns], of_rows, of_columns[:, columns])
        return rows, of_rows, of_columns

    of_rows = torch.zeros(2, count, dtype=torch.int64, device=own.device)
    of_columns = torch.zeros_like(of_rows)
    with _strips(_slices(count, height), strip, parallel=on_cpu) as results:
        for rows, some, all_of_them in results:
            of_rows[:, rows] = some
            of_columns += all_of_them
    counts = {"image_to_text": of_rows.cpu(), "text_to_image": of_columns.cpu()}
    return {
        # The own one is among those that are not behind.
        direction: (ahead.double(), (not_behind - ahead - 1).double())
        for direction, (ahead, not_behind) in counts.items()
    }


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@contextmanager
def _strips(
    parts: list[slice], work: Callable[[slice], Any], *, parallel: bool
) -> Iterator[Iterator[Any]]:
    """The results of strips, computed by as many threads as torch has, with progress shown."""
    threads = torch.get_num_threads()
    if not parallel or threads == 1 or len(parts) == 1:
        yield _shown(map(work, parts), parts)
        return
    torch.set_num_threads(1)  # a product of one strip is too small to be shared
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield _shown(pool.map(work, parts), parts)
    finally:
        torch.set_num_threads(threads)


def _shown(results: Iterator[Any], parts: list[slice]) -> Iterator[Any]:
    """Results as they are, and how far they are."""
    with Progress("Retrieval", parts[-1].stop, "queries") as bar:
        for part, result in zip(parts, results, strict=True):
            yield result
            bar.update(part.stop - part.start)


def _compare(
    lead: Tensor, own_rows: Tensor, own_columns: Tensor, of_rows: Tensor, of_columns: Tensor
) -> None:
    """Add to the counts what is ahead, and what is ahead or tied, in a tile; overwrites its leads.

    Args:
        lead: similarities less the own one of each row, [R, C].
        own_rows: the own similarity of each row, [R].
        own_columns: that of each column, [C].
        of_rows: counts of rows, int64 [2, R].
        of_columns: counts of columns, int64 [2, C].
    """
    of_rows[0] += (lead > TIE).sum(dim=1)
    of_rows[1] += (lead >= -TIE).sum(dim=1)
    lead.add_(own_rows[:, None]).sub_(own_columns)
    of_columns[0] += (lead > TIE).sum(dim=0)
    of_columns[1] += (lead >= -TIE).sum(dim=0)


def _compare_on_cpu(
    lead: Tensor, own_rows: Tensor, own_columns: Tensor, of_rows: Tensor, of_columns: Tensor
) -> None:
    """The same, reading the tile once while it is in the CPU's cache."""
    # Small counts side by side in memory: several of them are added to at a time.
    some = np.zeros((2, lead.shape[1]), np.int32)
    _compare_tile(lead.numpy(), own_rows.numpy(), own_columns.numpy(), of_rows.numpy(), some)
    of_columns += torch.from_numpy(some)


@compiled
def _compare_tile(
    lead: Any, own_rows: Any, own_columns: Any, of_rows: Any, of_columns: Any
) -> None:
    for i in range(lead.shape[0]):
        ahead = not_behind = 0
        own = own_rows[i]
        for j in range(lead.shape[1]):
            by_row = lead[i, j]
            by_column = by_row + own - own_columns[j]
            ahead += by_row > TIE
            not_behind += by_row >= -TIE
            of_columns[0, j] += np.int32(by_column > TIE)
            of_columns[1, j] += np.int32(by_column >= -TIE)
        of_rows[0, i] += ahead
        of_rows[1, i] += not_behind
