from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from vilmedic.phantom import FINDINGS
from vilmedic.phantom.case import Case, draw_case
from vilmedic.phantom.report import Statement, impression_text, report_text, state
from vilmedic.phantom.write import label_names

# Reads reports without knowing the templates: a keyword that is not negated.
KEYWORDS = {
    "Atelectasis": r"atelecta|volume loss",
    "Cardiomegaly": r"cardiomegaly|heart|cardiac",
    "Pleural Effusion": r"effusion|fluid",
    "Pneumonia": r"pneumonia|pneumonic|consolidation|airspace|infiltrate|infecti",
    "Pneumothorax": r"pneumothorax",
}
DENIAL = r"\b(no|not|without|absent|normal|negative|free of|clear)\b"
SIDES = {"right": r"\bright\b", "left": r"\bleft\b"}
CONFIGS = Path(__file__).parents[2] / "config" / "phantom"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [draw_case(3, "train", index) for index in range(600)]


def asserted(text: str) -> set[str]:
    sentences = [sentence.lower() for sentence in re.split(r"\. ?", text) if sentence]
    said = [sentence for sentence in sentences if not re.search(DENIAL, sentence)]
    return {name for name, word in KEYWORDS.items() if any(re.search(word, line) for line in said)}


def test_a_report_asserts_a_finding_if_and_only_if_it_is_labelled(cases: list[Case]) -> None:
    for case in cases:
        report = report_text(case)
        assert asserted(report) == set(label_names(case)) - {"No Finding"}, report


def test_no_finding_is_both_asserted_and_denied(cases: list[Case]) -> None:
    for case in cases:
        statements = state(case)
        present = {name for statement in statements for name in statement.asserts}
        denied = {name for statement in statements for name in statement.denies}
        assert not present & denied
        assert present == {finding.name for finding in case.findings}


def test_sides_and_severities_are_named(cases: list[Case]) -> None:
    for case in cases:
        findings = {finding.name: finding for finding in case.findings}
        for statement in state(case):
            if len(statement.asserts) != 1:
                continue
            side = findings[statement.asserts[0]].side
            named = {
                name for name, word in SIDES.items() if re.search(word, statement.text.lower())
            }
            if side == "bilateral":
                assert named in (set(), set(SIDES)), statement.text
                assert re.search(r"bilateral|both|right and left", statement.text.lower())
            else:
                assert named == ({side} if side else set()), statement.text


def test_joined_sentences_name_the_sides_of_both_findings(cases: list[Case]) -> None:
    joined = 0
    for case in cases:
        sides = {finding.name: finding.side for finding in case.findings}
        for statement in state(case):
            if len(statement.asserts) == 2:
                joined += 1
                wanted = {sides[name] for name in statement.asserts} - {""}
                found = {name for name, word in SIDES.items() if re.search(word, statement.text)}
                assert found == wanted, statement.text
    assert joined > 10


def test_reports_are_one_line_of_plain_sentences(cases: list[Case]) -> None:
    for case in cases:
        report = report_text(case)
        assert report.isascii()
        assert "\n" not in report
        assert not re.search(r"[{}]|  ", report)
        for sentence in re.split(r"(?<=\.) ", report):
            assert re.fullmatch(r"[A-Z][^.]+\.", sentence), sentence


def test_reports_vary(cases: list[Case]) -> None:
    reports = [report_text(case) for case in cases]
    assert len(set(reports)) > 0.95 * len(reports)
    effusions: set[str] = set()
    for case in cases:
        effusions |= {s.text for s in state(case) if s.asserts == ("Pleural Effusion",)}
    assert len(effusions) > 60


def test_a_report_is_never_empty() -> None:
    assert all(state(draw_case(5, "test", index)) for index in range(200))
    assert Statement("Normal chest radiograph.").asserts == ()


@pytest.mark.parametrize("name", ["prompts.yml", "prompts-impression.yml"])
def test_prompts_cover_and_assert_every_finding(name: str) -> None:
    prompts = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    assert set(prompts) == set(FINDINGS)
    for finding, groups in prompts.items():
        assert set(groups) == {"positive", "negative"}
        for group in groups.values():
            assert len(set(group)) == len(group) >= 3
        assert all(asserted(text) == {finding} for text in groups["positive"])
        assert all(asserted(text) == set() for text in groups["negative"])


def test_an_impression_names_exactly_the_findings(cases: list[Case]) -> None:
    for case in cases:
        text = impression_text(case)
        assert text == impression_text(case)
        for name in FINDINGS:
            named = re.search(rf"\b{name}\b", text, re.IGNORECASE) is not None
            assert named == (name in label_names(case)), text
        for finding in case.findings:
            said = next(part for part in text.split(".") if finding.name.lower() in part.lower())
            assert finding.side in said
        if not case.findings:
            assert re.search(r"no acute|clear|normal", text, re.IGNORECASE)
    assert len({impression_text(case) for case in cases}) > 150
