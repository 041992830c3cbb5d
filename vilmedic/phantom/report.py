"""Report generator of phantoms: findings, negations and neutral remarks as free text.

The sentences stand at the end, with words in braces to fill in: `{sev}` is a word for the severity,
`{side}` is right, left or bilateral, `{zone}` the zone of the lung, `{a sev}` the severity with its
article; a capital starts a sentence. Negations keep to words that no assertion uses, so that a
simple reader of reports can tell the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vilmedic.phantom import FINDINGS
from vilmedic.phantom.case import Case, CaseFinding

_SIZED = ("Pleural Effusion", "Pneumothorax")
_DENY_ONE, _DENY_MERGED, _JOIN = 0.75, 0.35, 0.3


@dataclass(frozen=True)
class Statement:
    """A sentence of a report, the findings it asserts and those it denies."""

    text: str
    asserts: tuple[str, ...] = ()
    denies: tuple[str, ...] = ()


def report_text(case: Case) -> str:
    """The report of a case on one line; every sentence ends with a full stop."""
    return " ".join(statement.text for statement in state(case))


def impression_text(case: Case) -> str:
    """The conclusion of a report on one line: each finding in a few words, or that there is none.

    As in real impressions nothing is denied one by one, and the words vary less.
    """
    rng = case.stream("impression")
    said = [
        _filled(
            IMPRESSION[finding.name],
            _severity(finding, rng),
            finding.side,
            finding.parts[0].zone,
        )
        for finding in case.findings
    ]
    return " ".join(said) or _pick(rng, NORMAL_IMPRESSION)


def state(case: Case) -> list[Statement]:
    """The sentences of a case's report, in the order in which they are written."""
    rng = case.stream("report")
    body = _assert_all(case.findings, rng)
    body += _deny([finding.name for finding in case.findings], case.body.low_volumes, rng)
    for topic in rng.permutation(len(FILLER))[: int(rng.integers(0, 3))]:
        body.append(Statement(_pick(rng, FILLER[int(topic)])))
    if case.body.low_volumes and rng.random() < 0.6:
        body.append(Statement(_pick(rng, LOW_VOLUMES)))
    if case.view.leads and rng.random() < 0.6:
        body.append(Statement(_pick(rng, LEADS)))
    statements = [body[int(i)] for i in rng.permutation(len(body))]
    if rng.random() < 0.3:
        text = _pick(rng, PROJECTION).format(projection=case.view.projection)
        statements.insert(0, Statement(text))
    return statements


def _assert_all(findings: Sequence[CaseFinding], rng: np.random.Generator) -> list[Statement]:
    """States every finding at least once, two of them at times in one sentence."""
    said: list[Statement] = []
    alone = list(findings)
    one_sided = [finding for finding in findings if finding.side != "bilateral"]
    if len(one_sided) > 1 and rng.random() < _JOIN:
        first, second = (one_sided[int(i)] for i in rng.permutation(len(one_sided))[:2])
        text = _pick(rng, JOINED_FRAMES).format(
            first=_word(PHRASES[first.name], first, rng),
            second=_word(PHRASES[second.name], second, rng),
        )
        said.append(Statement(text, asserts=(first.name, second.name)))
        if rng.random() < 0.5:
            alone = [finding for finding in findings if finding not in (first, second)]
    for finding in alone:
        templates = POSITIVE[finding.name]
        if finding.side == "bilateral":
            templates = BILATERAL[finding.name]
        said.append(Statement(_word(templates, finding, rng), asserts=(finding.name,)))
    return said


def _word(templates: Sequence[str], finding: CaseFinding, rng: np.random.Generator) -> str:
    template, severity = _pick(rng, templates), _severity(finding, rng)
    return _filled(template, severity, finding.side, finding.parts[0].zone)


def _severity(finding: CaseFinding, rng: np.random.Generator) -> str:
    words = SEVERITY_WORDS[finding.severity]
    if finding.severity == "moderate" and finding.name not in _SIZED:
        words = PLAIN_MODERATE
    return _pick(rng, words)


def _filled(template: str, severity: str, side: str, zone: str) -> str:
    """Puts the words of a finding into a template."""
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
        summary = Statement(_pick(rng, ALL_NORMAL), denies=FINDINGS)
        return [summary, *_deny_each(absent, 0.4, rng)]
    said: list[Statement] = []
    lung = ("Pneumonia", "Atelectasis")
    if not set(present) & {*lung, "Pleural Effusion", "Pneumothorax"} and rng.random() < 0.3:
        said.append(Statement(_pick(rng, CLEAR_LUNGS), denies=lung))
        absent = [name for name in absent if name not in lung]
    if len(absent) > 1 and rng.random() < _DENY_MERGED:
        count = int(rng.integers(2, min(3, len(absent)) + 1))
        together = [str(name) for name in rng.choice(absent, size=count, replace=False)]
        terms = [_pick(rng, MERGED_TERMS[name]) for name in together]
        listed = f"{', '.join(terms[:-1])} or {terms[-1]}"
        text = _pick(rng, MERGED_FRAMES).format(terms=listed)
        said.append(Statement(text, denies=tuple(together)))
        absent = [name for name in absent if name not in together]
    return said + _deny_each(absent, _DENY_ONE, rng)


def _deny_each(names: Sequence[str], share: float, rng: np.random.Generator) -> list[Statement]:
    chosen = [name for name in names if rng.random() < share]
    return [Statement(_pick(rng, NEGATIVE[name]), denies=(name,)) for name in chosen]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


SEVERITY_WORDS: dict[str, tuple[str, ...]] = {
    "mild": ("mild", "mild", "minor", "slight"),
    "small": ("small", "small", "tiny", "mild"),
    "moderate": ("moderate", "moderate", "moderately sized", "medium-sized"),
    "severe": ("severe", "severe", "marked", "extensive"),
    "large": ("large", "large", "sizeable", "massive"),
}
"""Words for each severity; those of size are kept to findings that have one."""

PLAIN_MODERATE = ("moderate", "moderate", "moderate", "intermediate")
"""Words for moderate where a finding has a degree but no size."""

POSITIVE: dict[str, tuple[str, ...]] = {
    "Pleural Effusion": (
        "There is {a sev} {side} pleural effusion.",
        "{A sev} {side} pleural effusion is present.",
        "{A sev} {side}-sided pleural effusion is seen.",
        "{Sev} pleural effusion on the {side}.",
        "{Sev} {side} effusion with blunting of the costophrenic angle.",
        "The {side} costophrenic angle is blunted by {a sev} pleural effusion.",
        "Pleural fluid collects on the {side}, {sev} in amount.",
        "Findings are consistent with {a sev} effusion in the {side} pleural space.",
        "Fluid in the {side} pleural space forms {a sev} effusion with a meniscus.",
        "The {side} hemidiaphragm is obscured by {a sev} pleural effusion.",
        "Opacity at the {side} base is due to {a sev} pleural effusion.",
        "{A sev} layer of pleural fluid is noted at the {side} base.",
    ),
    "Pneumonia": (
        "There is {sev} consolidation in the {side} {zone} lung zone.",
        "{Sev} {side} {zone} zone pneumonia.",
        "{A sev} patchy opacity in the {side} {zone} zone is concerning for pneumonia.",
        "{Sev} airspace consolidation of the {side} {zone} lung, compatible with pneumonia.",
        "Patchy consolidation in the {side} {zone} lung suggests {sev} pneumonia.",
        "The {side} {zone} lung shows {sev} airspace opacity consistent with pneumonia.",
        "Findings suggest {sev} pneumonia in the {side} {zone} zone.",
        "An ill-defined opacity in the {side} {zone} lung represents {sev} pneumonia.",
        "{Sev} infectious consolidation is noted in the {side} {zone} zone.",
        "{Side} {zone} zone airspace disease, {sev} in extent, likely pneumonia.",
        "Focal consolidation is seen on the {side} in the {zone} zone, {sev}.",
        "{Sev} pneumonic infiltrate in the {side} {zone} lung.",
    ),
    "Pneumothorax": (
        "There is {a sev} {side} pneumothorax.",
        "{A sev} {side} apical pneumothorax is present.",
        "{A sev} {side}-sided pneumothorax is identified.",
        "{Sev} pneumothorax on the {side}.",
        "A visceral pleural line on the {side} indicates {a sev} pneumothorax.",
        "{Sev} {side} pneumothorax with a visible pleural line.",
        "The {side} lung is separated from the chest wall by {a sev} pneumothorax.",
        "Air in the {side} pleural space, {a sev} pneumothorax.",
        "Findings are those of {a sev} pneumothorax at the {side} apex.",
        "The {side} lung has partly collapsed because of {a sev} pneumothorax.",
        "{A sev} amount of pleural air is visible on the {side}, in keeping with pneumothorax.",
        "Lucency along the {side} chest wall is due to {a sev} pneumothorax.",
    ),
    "Cardiomegaly": (
        "There is {sev} cardiomegaly.",
        "The heart shows {sev} enlargement.",
        "{Sev} cardiomegaly is present.",
        "{Sev} enlargement of the cardiac silhouette.",
        "The cardiac silhouette shows {sev} enlargement.",
        "The cardiothoracic ratio is increased, with {sev} cardiomegaly.",
        "Heart size is increased, {sev} cardiomegaly.",
        "{Sev} cardiac enlargement is noted.",
        "The transverse diameter of the heart is increased, indicating {sev} cardiomegaly.",
        "The enlarged heart is in keeping with {sev} cardiomegaly.",
    ),
    "Atelectasis": (
        "There is {sev} atelectasis in the {side} {zone} lung zone.",
        "{Sev} {side} {zone} zone atelectasis.",
        "{Sev} linear atelectasis in the {side} {zone} lung.",
        "{Sev} plate-like atelectasis is seen in the {side} {zone} zone.",
        "Linear opacity in the {side} {zone} lung represents {sev} atelectasis.",
        "Band-like opacity in the {side} {zone} zone is consistent with {sev} atelectasis.",
        "Volume loss on the {side} with {sev} atelectasis in the {zone} zone.",
        "{Sev} subsegmental atelectasis of the {side} {zone} lung.",
        "The {side} hemidiaphragm is raised by {sev} {zone} zone atelectasis.",
        "{Sev} atelectatic change in the {side} {zone} zone.",
        "Streaky opacity in the {side} {zone} lung, in keeping with {sev} atelectasis.",
    ),
}

BILATERAL: dict[str, tuple[str, ...]] = {
    "Pleural Effusion": (
        "There are {sev} bilateral pleural effusions.",
        "{Sev} bilateral pleural effusions are present.",
        "Both costophrenic angles are blunted by {sev} pleural effusions.",
        "{Sev} effusions on both sides.",
        "Pleural fluid is seen bilaterally, {sev} in amount.",
        "{Sev} pleural effusions in the right and left pleural spaces.",
    ),
    "Pneumonia": (
        "There is {sev} bilateral consolidation.",
        "{Sev} bilateral pneumonia.",
        "Patchy opacities in both lungs are consistent with {sev} pneumonia.",
        "{Sev} airspace consolidation in the right and left lung, likely pneumonia.",
        "Multifocal consolidation on both sides suggests {sev} pneumonia.",
        "{Sev} bilateral airspace disease concerning for pneumonia.",
    ),
}

PHRASES: dict[str, tuple[str, ...]] = {
    "Pleural Effusion": ("{a sev} {side} pleural effusion", "{a sev} {side}-sided effusion"),
    "Pneumonia": ("{sev} {side} {zone} zone pneumonia", "{sev} {side} {zone} zone consolidation"),
    "Pneumothorax": ("{a sev} {side} pneumothorax", "{a sev} {side}-sided pneumothorax"),
    "Cardiomegaly": ("{sev} cardiomegaly", "{sev} cardiac enlargement"),
    "Atelectasis": ("{sev} {side} {zone} zone atelectasis", "{sev} {side} {zone} lung atelectasis"),
}
JOINED_FRAMES = (
    "There is {first} and {second}.",
    "Findings include {first} and {second}.",
    "The study shows {first} together with {second}.",
    "Impression of {first} and {second}.",
)
"""Sentences that name two findings, filled with `PHRASES`."""

NEGATIVE: dict[str, tuple[str, ...]] = {
    "Pleural Effusion": (
        "No pleural effusion.",
        "There is no pleural effusion.",
        "There is no evidence of pleural effusion.",
        "No effusion is seen on either side.",
        "The costophrenic angles are sharp.",
        "Both costophrenic angles are clear.",
        "The pleural spaces are free of fluid.",
        "Pleural effusion is absent.",
        "The lung bases show no pleural fluid.",
    ),
    "Pneumonia": (
        "No focal consolidation.",
        "There is no consolidation.",
        "There is no evidence of pneumonia.",
        "No airspace opacity to suggest pneumonia.",
        "No consolidation is identified in either lung.",
        "Pneumonia is not seen.",
        "There is no sign of lung infection.",
        "The lungs show no infiltrate.",
        "No patchy airspace disease.",
    ),
    "Pneumothorax": (
        "No pneumothorax.",
        "There is no pneumothorax.",
        "There is no evidence of pneumothorax.",
        "No pneumothorax is detected on either side.",
        "Pneumothorax is absent.",
        "Lung markings reach the chest wall on both sides.",
        "No pleural line is visible to suggest pneumothorax.",
        "Both lungs are fully expanded, without pneumothorax.",
        "No free pleural air.",
    ),
    "Cardiomegaly": (
        "The heart is normal in size.",
        "Heart size is normal.",
        "No cardiomegaly.",
        "The cardiac silhouette is not enlarged.",
        "The cardiothoracic ratio is within normal limits.",
        "Cardiac size is within normal limits.",
        "There is no cardiac enlargement.",
        "Normal heart size.",
        "The heart is not enlarged.",
    ),
    "Atelectasis": (
        "No atelectasis.",
        "There is no atelectasis.",
        "There is no evidence of atelectasis.",
        "No volume loss is seen.",
        "No linear or band-like atelectasis.",
        "Atelectasis is absent.",
        "No atelectatic change in either lung.",
        "The lungs show no volume loss or atelectasis.",
    ),
}

MERGED_TERMS: dict[str, tuple[str, ...]] = {
    "Pleural Effusion": ("pleural effusion", "effusion", "pleural fluid"),
    "Pneumonia": ("focal consolidation", "pneumonia", "consolidation"),
    "Pneumothorax": ("pneumothorax",),
    "Cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "Atelectasis": ("atelectasis", "volume loss"),
}
MERGED_FRAMES = (
    "No {terms}.",
    "There is no {terms}.",
    "There is no evidence of {terms}.",
    "Negative for {terms}.",
    "The study shows no {terms}.",
)

CLEAR_LUNGS = (
    "The lungs are clear.",
    "Both lungs are clear.",
    "Lungs are clear without consolidation.",
    "Clear and well aerated lungs.",
)
"""Said only where neither consolidation nor atelectasis is there."""

ALL_NORMAL = (
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No acute disease of the chest.",
    "Unremarkable study of the chest.",
)
"""Said only where there is no finding at all."""

FILLER = (
    (
        "The bones are intact.",
        "No acute bony abnormality.",
        "Visualized osseous structures are unremarkable.",
    ),
    (
        "The mediastinal contours are unremarkable.",
        "The trachea is midline.",
        "The hilar contours are within usual limits.",
    ),
    (
        "No prior study is available for comparison.",
        "Comparison is made with the previous radiograph.",
    ),
    ("The soft tissues are unremarkable.", "The upper abdomen is unremarkable."),
    ("Exposure is adequate.", "The image quality is sufficient."),
    ("The aorta is of usual caliber.", "The thoracic aorta is unremarkable."),
)
"""Remarks about nothing that is labelled, by topic; a report holds one of a topic at most."""

PROJECTION = (
    "Single {projection} view of the chest.",
    "Frontal {projection} radiograph of the chest was obtained.",
    "{projection} chest film.",
)
LOW_VOLUMES = ("Low lung volumes.", "Lung volumes are low.", "The patient inspired poorly.")
LEADS = (
    "Monitoring leads overlie the chest.",
    "ECG leads project over the thorax.",
    "External leads are noted.",
)

IMPRESSION: dict[str, str] = {
    "Pleural Effusion": "{Sev} {side} pleural effusion.",
    "Pneumonia": "{Sev} {side} {zone} zone pneumonia.",
    "Pneumothorax": "{Sev} {side} pneumothorax.",
    "Cardiomegaly": "{Sev} cardiomegaly.",
    "Atelectasis": "{Sev} {side} {zone} zone atelectasis.",
}
"""How an impression names each finding; one on both sides is bilateral."""

NORMAL_IMPRESSION = (
    "No acute disease of the chest.",
    "Clear lungs and a heart of normal size.",
    "Normal chest.",
)
