from __future__ import annotations

import random
import time

import numpy as np

from vilmedic.phantom.case import draw_case
from vilmedic.phantom.report import report_text
from vilmedic.preparation.report_facts import duplicate_groups, normal_form, repeated_share

WORDS = [f"word{number}" for number in range(300)]


def jaccard(one: str, other: str) -> float:
    """Jaccard similarity of the sets of word trigrams, from its definition."""
    a, b = (
        {tuple(words[n : n + 3]) for n in range(max(1, len(words) - 2))}
        for words in (normal_form(one).split(), normal_form(other).split())
    )
    return len(a & b) / len(a | b)


def variants(draw: random.Random, size: int) -> list[str]:
    """Reports with copies that have some changed words."""
    reports = []
    for _ in range(size):
        words = draw.choices(WORDS, k=draw.randint(20, 60))
        for changes in (0, 1, 4, 12):
            copy = list(words)
            for place in draw.sample(range(len(copy)), changes):
                copy[place] = "changed"
            reports.append(" ".join(copy))
    return reports


def test_groups_agree_with_the_similarity_of_every_pair() -> None:
    reports = variants(random.Random(0), 60)
    exact, near = duplicate_groups(reports)
    for one in range(len(reports)):
        for other in range(one):
            similarity = jaccard(reports[one], reports[other])
            assert (exact[one] == exact[other]) == (reports[one] == reports[other])
            if similarity > 0.9:
                assert near[one] == near[other], similarity
            if near[one] == near[other]:
                assert similarity > 0.6, similarity


def test_case_and_punctuation_do_not_matter() -> None:
    reports = ["No effusion. Heart normal.", "no effusion - heart NORMAL", "Heart normal.", ""]
    exact, near = duplicate_groups(reports)
    assert exact.tolist() == [0, 0, 1, 2]
    assert repeated_share(exact) == repeated_share(near) == 0.25
    assert [len(groups) for groups in duplicate_groups([])] == [0, 0]
    assert repeated_share(np.zeros(0)) == 0


def test_many_reports_are_grouped_in_seconds() -> None:
    reports = [report_text(draw_case(0, "train", number)) for number in range(300)] * 20
    started = time.process_time()
    exact, _ = duplicate_groups(reports)
    assert repeated_share(exact) >= 0.95
    assert time.process_time() - started < 10
