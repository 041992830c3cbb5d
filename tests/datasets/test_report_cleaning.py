"""Expected texts follow from the rules of the published code, worked out by hand."""

from __future__ import annotations

import pytest

from vilmedic.datasets.report_cleaning import (
    gloria_clean_report_chexpert,
    ifcc_clean_report,
    r2gen_clean_report,
)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("The heart is normal. No effusion.", "the heart is normal . no effusion ."),
        ("FINDINGS:\nClear   lungs..", "findings clear lungs ."),
        ("Compared to ___, no change.", "compared to  no change ."),
        # A number after a full stop goes with it; one without makes a sentence end.
        (
            "1. Clear lungs. 2. Normal heart 3. No effusion.",
            "clear lungs . normal heart . no effusion .",
        ),
        # Hyphens stay; quotes, slashes and the signs between ":" and "[" go.
        ("X-ray <5 mm; 'AP/PA' \"view\" @ [12:30]", "x-ray 5 mm appa view  1230 ."),
        # Oddities: "1. " goes at the end of a longer number, and 6 and above are not numbers.
        ("T11. Clear. 6. Normal", "t1clear . 6 . normal ."),
        ("___", ""),
        ("", ""),
    ],
)
def test_r2gen(report: str, expected: str) -> None:
    assert r2gen_clean_report(report) == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("No effusion, 3.5 cm.", "no effusion , 3 . 5 cm ."),
        ("Size (R>L)...  X-ray\n", "size ( r > l )... x - ray"),
        ("", ""),
    ],
)
def test_ifcc(report: str, expected: str) -> None:
    assert ifcc_clean_report(report) == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            "1. No acute disease.\n2.Stable.  Heart size: normal!",
            "no acute disease heart size normal",
        ),
        ("Nódulo pulmonar. Sin cambios", "ndulo pulmonar sin cambios"),
        ("left\ufffd\ufffdlung clear", "left lung clear"),
        ("Normal. Stable. Clear.", ""),
        ("A 3.5 cm mass", "5 cm mass"),  # "3." is taken for a list number, "A" for a sentence
    ],
)
def test_gloria(report: str, expected: str) -> None:
    assert gloria_clean_report_chexpert(report) == expected
