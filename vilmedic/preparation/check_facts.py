"""What a check of a data set has found out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vilmedic.datasets.lines import SHOWN, listed
from vilmedic.preparation.image_facts import ImageFacts
from vilmedic.preparation.report_facts import LostLetters, UnknownWords


@dataclass
class SplitFacts:
    """What was found out about a split.

    Attributes:
        lines: of each part's file; a part that cannot be read is missing.
        images: what the images are like.
        texts: the reports as they are in their file.
        named: paths of the images, with the line of each.
        missing: lines with an image that is not there.
        empty: reports without a text, before or after cleaning.
        reports: exact and near duplicate group of each report that is not empty.
        most_frequent: a report that is there most often, and how often that is.
        lengths: ids of each report.
        max_len: most ids that a report may have.
        lost: letters that cleaning drops; None without cleaning.
        unknown: words that the tokenizer does not know; None where that is not known.
        labels: how many lines have each label.
        patients: who each line is of; None when that is not known.
    """

    lines: dict[str, int] = field(default_factory=dict)
    images: ImageFacts | None = None
    texts: Sequence[str] = ()
    missing: int = 0
    named: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    reports: tuple[np.ndarray, np.ndarray] | None = None
    most_frequent: tuple[str, int] = ("", 0)
    lengths: np.ndarray | None = None
    max_len: int = 0
    lost: LostLetters | None = None
    unknown: UnknownWords | None = None
    labels: Counter[str] = field(default_factory=Counter)
    patients: list[str] | None = None


@dataclass
class Findings:
    """The result of a check.

    Attributes:
        splits: what was found out, by split.
        errors: what keeps a run from starting, stops it or spoils its result.
        warnings: where a run would see something else than the files show.
        advice: what a user should know, of data that a run would see as they are.
        named: all files, lines or names that errors, warnings and advice list the first of, by
            what they are.
    """

    splits: dict[str, SplitFacts] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    named: dict[str, list[str]] = field(default_factory=dict)

    def listed(self, where: str, items: Sequence[str], kind: str, what: str = "") -> str:
        """`2 blank images: a, b`, or the first few of many, of which `named` keeps all.

        Args:
            where: the split, or several.
            items: what there is.
            kind: what one of them is.
            what: what they have in common, where the kind does not say it.
        """
        if len(items) > SHOWN:
            name = f"{where}: {len(items)} {kind}s{f' {what}' if what else ''}"
            self.named.setdefault(name, []).extend(items)
        return listed(items, kind)
