from __future__ import annotations

import pytest

from vilmedic.datasets.sentences import split_sentences


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("No effusion. Heart normal!", ["No effusion.", "Heart normal!"]),
        ("A 3.5 cm mass. No effusion.", ["A 3.5 cm mass.", "No effusion."]),
        (
            "Devices, e.g. a tube. Seen by Dr. Smith today.",
            ["Devices, e.g. a tube.", "Seen by Dr. Smith today."],
        ),
        ("1. No effusion. 2. Heart is normal.", ["No effusion.", "Heart is normal."]),
        (
            "Impression: 1. No effusion 2) Heart is normal",
            ["Impression: No effusion", "Heart is normal"],
        ),
        # Numbers that do not count up from 1 are not list numbers.
        ("Arthritis grade 2. The lungs are clear.", ["Arthritis grade 2.", "The lungs are clear."]),
        ("the lungs are clear . a 3 . 5 cm mass .", ["the lungs are clear .", "a 3 . 5 cm mass ."]),
        # Too short alone: joined to what precedes, or follows when there is nothing before.
        ("Lungs are clear. Stable. No effusion.", ["Lungs are clear. Stable.", "No effusion."]),
        ("Stable. No effusion seen.", ["Stable. No effusion seen."]),
        ("Normal.", ["Normal."]),
        ("no stops at all", ["no stops at all"]),
        ("...", ["..."]),
    ],
)
def test_sentences(report: str, expected: list[str]) -> None:
    assert split_sentences(report) == expected
