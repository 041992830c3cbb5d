from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.errors import DataError
from vilmedic.metrics.findings import Finding, read_findings


def write(root: Path, *lines: str) -> str:
    (root / "test.finding.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(root)


def test_reads_names_sides_and_boxes(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        '{"Mass": {"side": "left", "parts": [{"box": [0, 0.5, 1, 1], "centre": [0.5, 0.7]}]}}',
        "{}",
        '{"A": {"side": "bilateral"}, "B": {"side": null, "severity": "mild", "parts": []}}',
    )
    assert read_findings(root, "test", "finding.jsonl") == [
        [Finding("Mass", "left", ((0.0, 0.5, 1.0, 1.0),))],
        [],
        [Finding("A", None, ()), Finding("B", None, ())],
    ]


def test_the_left_of_the_patient_is_the_right_of_the_picture() -> None:
    halves = [Finding("Mass", side, ()).image_half for side in ("left", "right", None)]
    assert halves == ["right", "left", None]


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[1]",
        '{"Mass": 3}',
        '{"Mass": {"parts": [{"centre": [0, 0]}]}}',
        '{"Mass": {"parts": [{"box": [0, 0, 1]}]}}',
        '{"Mass": {"parts": [{"box": [0, 0, 1, "x"]}]}}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    root = write(tmp_path, "{}", line)
    with pytest.raises(DataError, match=r"test\.finding\.jsonl:2: not a record of findings.*box"):
        read_findings(root, "test", "finding.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.finding\.jsonl"):
        read_findings(str(tmp_path), "test", "finding.jsonl")
