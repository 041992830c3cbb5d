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
        ("两肺清晰。心影不大!未见积液？", ["两肺清晰。", "心影不大!未见积液？"]),
        ("हृदय सामान्य है। फेफड़े साफ हैं।", ["हृदय सामान्य है।", "फेफड़े साफ हैं।"]),
    ],
)
def test_sentences(report: str, expected: list[str]) -> None:
    assert split_sentences(report) == expected


@pytest.mark.parametrize(
    "repeated", [".", ". ", "a. ", "e.g. ", "1. ", "1 . 2 ", " 1) ", " ", "。", "?!", "x", "a b. "]
)
def test_a_report_of_a_megabyte_is_split_in_one_pass(repeated: str) -> None:
    text = "clear lungs " + repeated * (2**20 // len(repeated)) + "x"
    sentences = split_sentences(text)  # a pass for each stop would take hours
    assert "".join("".join(sentences).split()).startswith("clearlungs")
    if repeated == "a b. ":
        assert len(sentences) == 2**20 // 5
