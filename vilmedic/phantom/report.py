"""Free-text reports that say what is in a case, deny what is not, and add neutral remarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vilmedic.phantom import FINDINGS, wording
from vilmedic.phantom.case import Case, Finding

_SIZED = ("Pleural Effusion", "Pneumothorax")
_DENY_ONE, _DENY_MERGED, _JOIN = 0.75, 0.35, 0.3


@dataclass(frozen=True)
class Statement:
    """A sentence of a report, the findings it asserts and those it denies."""

    text: str
    asserts: tuple[str, ...] = ()
    denies: tuple[str, ...] = ()


def write_report(case: Case) -> str:
    """The report of a case on one line; every sentence ends with a full stop."""
    return " ".join(statement.text for statement in state(case))


def write_impression(case: Case) -> str:
    """The conclusion of a report on one line: each finding in a few words, or that there is none.

    As in real impressions nothing is denied one by one, and the words vary less.
    """
    rng = case.stream("impression")
    said = [
        fill(
            wording.IMPRESSION[finding.name],
            _severity(finding, rng),
            finding.side,
            finding.parts[0].zone,
        )
        for finding in case.findings
    ]
    return " ".join(said) or _pick(rng, wording.NORMAL_IMPRESSION)


def state(case: Case) -> list[Statement]:
    """The sentences of a case's report, in the order in which they are written."""
    rng = case.stream("report")
    body = _assert_all(case.findings, rng)
    body += _deny([finding.name for finding in case.findings], case.body.low_volumes, rng)
    for topic in rng.permutation(len(wording.FILLER))[: int(rng.integers(0, 3))]:
        body.append(Statement(_pick(rng, wording.FILLER[int(topic)])))
    if case.body.low_volumes and rng.random() < 0.6:
        body.append(Statement(_pick(rng, wording.LOW_VOLUMES)))
    if case.view.leads and rng.random() < 0.6:
        body.append(Statement(_pick(rng, wording.LEADS)))
    statements = [body[int(i)] for i in rng.permutation(len(body))]
    if rng.random() < 0.3:
        text = _pick(rng, wording.PROJECTION).format(projection=case.view.projection)
        statements.insert(0, Statement(text))
    return statements


def _assert_all(findings: Sequence[Finding], rng: np.random.Generator) -> list[Statement]:
    """States every finding at least once, two of them at times in one sentence."""
    said: list[Statement] = []
    alone = list(findings)
    one_sided = [finding for finding in findings if finding.side != "bilateral"]
    if len(one_sided) > 1 and rng.random() < _JOIN:
        first, second = (one_sided[int(i)] for i in rng.permutation(len(one_sided))[:2])
        text = _pick(rng, wording.JOINED_FRAMES).format(
            first=_word(wording.PHRASES[first.name], first, rng),
            second=_word(wording.PHRASES[second.name], second, rng),
        )
        said.append(Statement(text, asserts=(first.name, second.name)))
        if rng.random() < 0.5:
            alone = [finding for finding in findings if finding not in (first, second)]
    for finding in alone:
        templates = wording.POSITIVE[finding.name]
        if finding.side == "bilateral":
            templates = wording.BILATERAL[finding.name]
        said.append(Statement(_word(templates, finding, rng), asserts=(finding.name,)))
    return said


def _word(templates: Sequence[str], finding: Finding, rng: np.random.Generator) -> str:
    template, severity = _pick(rng, templates), _severity(finding, rng)
    return fill(template, severity, finding.side, finding.parts[0].zone)


def _severity(finding: Finding, rng: np.random.Generator) -> str:
    words = wording.SEVERITY_WORDS[finding.severity]
    if finding.severity == "moderate" and finding.name not in _SIZED:
        words = wording.PLAIN_MODERATE
    return _pick(rng, words)


def fill(template: str, severity: str, side: str, zone: str) -> str:
    """Puts the words of a finding into a template of `vilmedic.phantom.wording`."""
    article = "an" if severity[0] in "aeio" else "a"
    with_article = f"{article} {severity}"
    for mark, words in (
        ("{sev}", severity),
        ("{Sev}", severity.capitalize()),
        ("{a sev}", with_article),
        ("{A sev}", with_article.capitalize()),
        ("{side}", side),
        ("{Side}", side.capitalize()),
        ("{zone}", zone),
    ):
        template = template.replace(mark, words)
    return template


def _deny(present: Sequence[str], low_volumes: bool, rng: np.random.Generator) -> list[Statement]:
    """Denies most of the absent findings, some of them together in one sentence."""
    absent = [name for name in FINDINGS if name not in present]
    if not present and not low_volumes and rng.random() < 0.3:
        summary = Statement(_pick(rng, wording.ALL_NORMAL), denies=FINDINGS)
        return [summary, *_deny_each(absent, 0.4, rng)]
    said: list[Statement] = []
    lung = ("Pneumonia", "Atelectasis")
    if not set(present) & {*lung, "Pleural Effusion", "Pneumothorax"} and rng.random() < 0.3:
        said.append(Statement(_pick(rng, wording.CLEAR_LUNGS), denies=lung))
        absent = [name for name in absent if name not in lung]
    if len(absent) > 1 and rng.random() < _DENY_MERGED:
        count = int(rng.integers(2, min(3, len(absent)) + 1))
        together = [str(name) for name in rng.choice(absent, size=count, replace=False)]
        terms = [_pick(rng, wording.MERGED_TERMS[name]) for name in together]
        listed = f"{', '.join(terms[:-1])} or {terms[-1]}"
        text = _pick(rng, wording.MERGED_FRAMES).format(terms=listed)
        said.append(Statement(text, denies=tuple(together)))
        absent = [name for name in absent if name not in together]
    return said + _deny_each(absent, _DENY_ONE, rng)


def _deny_each(names: Sequence[str], share: float, rng: np.random.Generator) -> list[Statement]:
    chosen = [name for name in names if rng.random() < share]
    return [Statement(_pick(rng, wording.NEGATIVE[name]), denies=(name,)) for name in chosen]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
