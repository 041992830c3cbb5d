"""kNN classification on frozen features."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, sparray
from torch import Tensor
from torch.nn import functional

from vilmedic.config.types import AtLeast, Portion, Resamples, Temperature
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.metrics.classification import TIE, Scores, report_classes, undefined
from vilmedic.metrics.contract import Metric
from vilmedic.metrics.linear_probe import nested_subsets, read_fractions

logger = logging.getLogger(__name__)

# Squares of similarities held at a time, whatever the size of the splits.
BLOCK = 1 << 24


class NearestNeighbours(Metric):
    """Weighted vote of the k nearest samples of the training split (Wu et al. 2018).

    Neighbours are found by cosine similarity s and vote with weight exp(s / temperature); the
    score of a class is its share of the votes. Voters that are equally far share the places that
    are left among the k. A sample never votes for itself. Accuracy is the share of right decisions
    at one half of the votes, the mean over classes, or of right classes when a sample has one
    label; a tie counts by the share of its decisions that are right. Labels that are unknown get no
    vote and are not scored. Fractions are prefixes of one seeded permutation, the same as those of
    the linear probe.

    Args:
        features: the feature that is compared.
        k: number of neighbours; all samples when there are fewer.
        temperature: how fast votes fade with distance.
        fractions: shares of the training labels that vote, such as 0.01, 0.1 and 1.0; the largest
            gives the headline numbers.
        fit_split: the split that votes.
        bootstrap: resamples behind each 95% interval.
    """

    numbers: ClassVar = {"auroc": "higher", "average_precision": "higher", "accuracy": "higher"}

    def __init__(
        self,
        *,
        features: str = "visual_backbone",
        k: Annotated[int, AtLeast(1)] = 20,
        temperature: Temperature = 0.07,
        fractions: list[Portion] | None = None,
        fit_split: str = "train",
        bootstrap: Resamples = 1000,
    ) -> None:
        self.features = features
        self.k = k
        self.temperature = temperature
        self.fractions = read_fractions(fractions)
        self.fit_split = fit_split
        self.bootstrap = bootstrap

    def check(self, evaluation: Evaluation) -> None:
        """Refuse a feature that the model does not give, and a split that is not there."""
        evaluation.check_feature(self.features, "features")
        if self.fit_split != evaluation.split:
            evaluation.networks.dataset(self.fit_split)

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`auroc`, `average_precision`, `accuracy` with intervals, `classes`, and `fractions`.

        All are None for features or data that do not allow them.
        """
        split = evaluation.features
        if split.labels is None:
            logger.warning(
                "knn: no labels on the split '%s', so it is null. Add %s",
                evaluation.split,
                LABEL_OVERRIDES,
            )
            return undefined(accuracy=True) | {"fractions": []}
        queries = evaluation.feature(self.features)
        if queries is None:
            return undefined(accuracy=True) | {"fractions": []}
        queries = queries[evaluation.repeats("image")]
        voters = evaluation.feature(self.features, self.fit_split)
        votes = evaluation.other(self.fit_split).labels
        if voters is None or votes is None or len(voters) < 2:
            return undefined(accuracy=True) | {"fractions": []}
        subsets = nested_subsets(len(voters), self.fractions, evaluation.seed)
        reports = []
        logged: set[tuple[str, ...]] = set()
        for fraction, rows in zip(self.fractions, subsets, strict=True):
            neighbours = Neighbours(
                queries.flatten(1),
                voters.flatten(1)[rows],
                k=self.k,
                temperature=self.temperature,
                own=rows if self.fit_split == evaluation.split else None,
                device=evaluation.device,
            )
            scores = neighbours.scores(votes[rows.numpy()])
            report = report_classes(
                scores,
                split.labels,
                split.label_names,
                unknown=split.unknown,
                multi_label=split.multi_label,
                bootstrap=self.bootstrap,
                seed=evaluation.seed,
                context=f"knn, {evaluation.name}, split {evaluation.split}",
                logged=logged,
            )
            reports.append({"fit": {"fraction": fraction, "samples": len(rows)}} | report)
        evaluation.record_scores(scores, split.label_names)
        return reports[-1] | {"fractions": reports}


class Neighbours:
    """The nearest voters of some queries, and what each of their votes weighs.

    Computed in float64: a class that all neighbours have gets the same share for every query, and
    the shares of two classes add up to one, so that both rank the queries alike.

    Args:
        queries: [N, D].
        voters: [M, D].
        k: number of neighbours. Where the k-th is as far as others behind it, each of these votes
            with the share of them that has a place.
        temperature: weights are exp(similarity / temperature).
        own: the query that each voter is, int64 [M], for which it does not vote; None when the
            voters are other samples.
        device: where they are compared.
    """

    def __init__(
        self,
        queries: Tensor,
        voters: Tensor,
        *,
        k: int,
        temperature: float,
        own: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.queries, self.voters = (
            functional.normalize(x.to(device, torch.float64), dim=1) for x in (queries, voters)
        )
        self.k = min(k, len(voters) - (own is not None))
        self.temperature, self.own = temperature, None if own is None else own.to(device)
        weights, neighbours, lasts, crowded = [], [], [], []
        for rows in torch.arange(len(queries)).split(max(1, BLOCK // len(voters))):
            similarity = self._similarity(rows)
            nearest, places = similarity.topk(self.k, dim=1)
            weights.append((nearest / temperature).softmax(dim=1).cpu())
            neighbours.append(places.cpu())
            lasts.append(nearest[:, -1:])
            crowded.append(rows[((similarity >= nearest[:, -1:] - TIE).sum(dim=1) > self.k).cpu()])
        self.last, self.crowded = torch.cat(lasts), torch.cat(crowded)
        starts = np.arange(len(queries) + 1) * self.k
        self.weights = csr_array(
            (torch.cat(weights).flatten().numpy(), torch.cat(neighbours).flatten().numpy(), starts),
            shape=(len(queries), len(voters)),
        )

    def scores(self, votes: csr_array) -> Scores:
        """Share of the votes that each class gets from the nearest voters, between 0 and 1.

        Args:
            votes: labels of the voters, bool [M, L].

        Returns:
            Gives the shares of a slice of the classes, float64 [N, C].
        """
        by_column = votes.tocsc()

        def shares(block: slice) -> NDArray[np.float64]:
            some = by_column[:, block].astype(np.float64)
            found: NDArray[np.float64] = (self.weights @ some).toarray()
            if len(self.crowded):
                for rows in self.crowded.split(max(1, BLOCK // len(self.voters))):
                    found[rows.numpy()] = self._crowded_shares(rows, some)
            return found

        return shares

    def _similarity(self, rows: Tensor) -> Tensor:
        """Of some queries with all voters, [R, M]."""
        rows = rows.to(self.queries.device)
        similarity = self.queries[rows] @ self.voters.T
        if self.own is not None:
            similarity.masked_fill_(rows[:, None] == self.own, -torch.inf)
        return similarity

    def _crowded_shares(self, rows: Tensor, votes: sparray) -> NDArray[np.float64]:
        """Shares [R, C] of queries that have several voters at the distance of their k-th one."""
        similarity, last = self._similarity(rows), self.last[rows.to(self.last.device)]
        nearer, tied = similarity > last + TIE, (similarity - last).abs() <= TIE
        left = self.k - nearer.sum(dim=1, keepdim=True)
        largest = similarity.amax(dim=1, keepdim=True)
        weights = ((similarity - largest) / self.temperature).exp()
        weights *= nearer + tied * (left / tied.sum(dim=1, keepdim=True))
        weights = weights.cpu()
        return weights.numpy() @ votes / weights.sum(dim=1, keepdim=True).numpy()
