"""Removal of references to earlier studies and of de-identification marks from reports.

A model that sees one study cannot know an earlier one: "unchanged from prior" teaches it words that
no image explains (Ramesh et al. 2022, arXiv:2210.06340). That work removes them with a trained
model; these are rules for English reports, based on those of Indiana University and MIMIC-CXR.
Statements about the image itself stay: "Stable cardiomegaly" becomes "Cardiomegaly", and "The
effusion is unchanged" becomes "The effusion is present". A sentence with no other content
("Unchanged.", "The heart size is stable.") is removed. "No new effusion" stays, since it does not
imply that there is none, and so does medical history ("prior CABG").
"""

from __future__ import annotations

import re
from collections.abc import Callable

from vilmedic.datasets.lines import split_at_stops, words

Replacement = str | Callable[["re.Match[str]"], str]

# De-identification marks: `___` and `[** ... **]` of MIMIC, `XXXX` of Indiana. While rules are
# applied, one private-use character replaces each run of marks: runs inside repeated patterns could
# make matching take exponential time.
_X = r"(?:X{3,}|x{4,})"
# Indiana's are also inside words and dates, whose rest says nothing: `XXXXPM`, `comparisXXXX/11`.
_WITHIN = r"[^\W\d_]*(?:X{4,}|x{4,})[^\W\d_]*"
_XS = (
    rf"(?:\d{{1,4}}/{{1,2}}){{0,2}}(?<![^\W\d_])(?:{_X}(?:-{_X})*(?![^\W\d_])|{_WITHIN})"
    r"(?:/{1,2}\d{1,4}){0,2}"
)
_MARK = rf"(?:_{{2,}}|\[\*\*.{{0,80}}?\*\*\]|{_XS})"
_HIDDEN = "[\ue000-\uf8ff]"
_RUN = re.compile(rf"(?:{_MARK}|{_HIDDEN})(?:[\s,/]*(?:{_MARK}|{_HIDDEN}))*")
_MONTH = r"(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DATE = (
    rf"(?:{_HIDDEN}|\d{{1,4}}[/-]\d{{1,2}}(?:[/-]\d{{2,4}})?|{_MONTH}\s\d{{1,2}}(?:,?\s\d{{4}})?"
    rf"|{_MONTH}\s\d{{4}}|(?:19|20)\d\d|yesterday(?:'s)?"
    r"|\w+ (?:hour|day|week|month|year)s? (?:ago|earlier|before|prior))"
)
_STUDY = (
    r"(?:stud(?:y|ies)|exam(?:s|ination|inations)?|(?:radio|mammo|tomo)grams?|radiographs?|films?"
    r"|x-?rays?|cxrs?|images?|imaging|cts?|scans?)"
)
_EARLIER = r"(?:priors?|previous|earlier|preceding|older|last|recent|comparisons?|outside)"
_AROUND = (
    r"(?:the|a|an|any|his|her|one|two|most|multiple|several|other|many|all|and|chest|portable|pa|ap"
    rf"|lateral|frontal|views?|single|computed|dated|performed|obtained|done|taken|from|of|on|at"
    rf"|{_STUDY})"
)
_BEHIND = r"(?=\s*(?:$|[,.;:()]|(?:and|with|without|which|but|there|the|is|are|was|no|may)\b))"
_PRIOR = (
    rf"(?:{_AROUND}\s+)*(?:(?:{_EARLIER}|{_DATE})(?:\s+(?:{_AROUND}|{_EARLIER}|{_DATE}))*"
    rf"\s+(?:{_STUDY}|{_DATE}|comparisons?)(?![\w-])|{_DATE}(?![\w-])|{_EARLIER}{_BEHIND})"
)
"""An earlier study: `the prior chest radiograph of ___`, `prior`, but not `prior CABG`."""
_SEEN = r"(?:seen|noted|described|identified|visuali[sz]ed|demonstrated|reported|mentioned|present)"
_COMPARED = (
    r"(?:(?:as|when)\s+)?(?:compared|(?:in|by) comparison|relative|comparison (?:is|was) made)"
    r"\s+(?:to|with)(?:\s+(?:that|those) (?:on|of|from))?"
)
_BEFORE = (
    rf"(?:{_COMPARED}\s+{_PRIOR}|since\s+{_PRIOR}|as on\s+{_PRIOR}|as before|{_COMPARED} before"
    r"|(?:in|over|during|for|within) the (?:intervals?|interim)(?: period)?"
    rf"|as (?:was |were )?(?:previously|before)(?: {_SEEN})?)"
)
_FROM = (
    rf"(?:{_BEFORE}|(?:from|to|with|versus|vs\.?|than(?: on)?|over|in|dating back to)\s+{_PRIOR})"
)
_DEGREE = (
    r"(?:(?:grossly|essentially|relatively|largely|overall|radiographically|significantly|slightly"
    r"|mildly|markedly|minimally|somewhat|substantially|appreciably|also|still|otherwise|fairly"
    r"|probably|likely|not|much|more|less|perhaps|quite|completely|roughly|generally|likewise)\s+)*"
)
_CLINICAL = "".join(rf"(?<!\b{word} )" for word in ("clinically", "dynamically", "medically"))
_STABLE = rf"(?:unchanged|unaltered|{_CLINICAL}stable(?! condition))"
_CHANGED = (
    r"(?:improved|worsened|increased|decreased|progressed|changed|larger|smaller|enlarged|reduced"
    rf"|distinct|conspicuous|prominent|apparent|similar|{_HIDDEN})"
)
_SIDE = r"(?:size|appearance|position|extent|number|configuration|contour|severity|degree|volume)"
_GROWN = r"(?:improved|worsened|increased|decreased|progressed|enlarged|grown)"
_ASPECT = rf"(?:\s+in (?:overall )?{_SIDE}(?:(?:,| and|/) ?{_SIDE})*)?"
_STATE = (
    rf"{_DEGREE}(?:{_STABLE}{_ASPECT}(?:,?\s+{_FROM})?|{_CHANGED}{_ASPECT},?\s+{_FROM})(?![\w-])"
)
"""A comparison with before: `grossly unchanged from prior`, `larger than on ___`."""
_BE = r"(?P<be>(?:is|are|was|were|has|have|appears?|remains?)(?: been| remained)?)"
_VERB = r"(?:is|are|has|have|appears?|remains?|may|likely|probably|represents?|reflects?|suggests?)"
_END = r"(?=\s*(?:$|[,;)]))"
_END_OR_WITH = r"(?=\s*(?:$|[,;)]|\bwith(?:out)?\b))"
_LOOK = r"(?:appearance|position|positioning|configuration|extent|size) of (?:the )?"
_GROWTH = (
    r"(?:(?:increase|decrease|development|appearance|placement|insertion|worsening|improvement"
    r"|progression|enlargement|reduction|performance)s?/?)+"
)
_PLAIN = r"(?:normal|enlarged|large|small|low|mild|tortuous|unremarkable|clear|elevated)"
_SLIGHT = (
    r"(?:(?:significant|relevant|appreciable|interval|substantial|definite|major|gross|notable"
    r"|other|evident|obvious|marked)\s+)*"
)
_WITHOUT_VERB = (
    r"((?:(?!\b(?:is|are|was|were|has|have|had|there|but|which|that|and (?:the|an?))\b)[\w\s-])+?)"
)
"""The subject of a sentence, without a preceding clause."""
_CLEARED = (
    r"(?!.*\b(?:lungs?|lobes?|bas(?:e|is|es)|zones?|fields?|ap(?:ex|ices)|hemithora(?:x|ces)|chest|spaces?"
    r"|angles?|sulc(?:us|i)|airways?|parenchyma) (?:has|have)\b)"
)
"""Subjects that remain after they have cleared, such as lungs."""
_WHOLLY = r"(?:(?:completely|entirely|fully|now|also|since|otherwise|subsequently)\s+)*"
_WORSE = (
    r"(?:(?:increase|decrease|worsening|improvement|progression|enlargement|reduction|change)s?"
    r"(?:\s*(?:,|/|or|and)\s*)?)+"
)
_ADVICE = r"would|may|should|could|can|might|recommended|suggested|advised|if"
_THERE = r"(?:there (?:is|are|was|has been|have been) )?"


def _plural(match: re.Match[str]) -> bool:
    verb = match["be"].lower().split()[0]
    return verb in ("are", "were", "have", "appear", "remain", "persist")


def _present(match: re.Match[str]) -> str:
    """Replacement of a verb and a state: the subject is present."""
    return " are present" if _plural(match) else " is present"


def _is(match: re.Match[str]) -> str:
    return "are " if _plural(match) else "is "


def _none(match: re.Match[str]) -> str:
    """Replacement of a resolved finding: there is none; abbreviations keep their capitals."""
    what = match[1]
    return f"no {what if what[1:2].isupper() else what[:1].lower() + what[1:]}"


def _compiled(*rules: tuple[str, Replacement]) -> list[tuple[re.Pattern[str], Replacement]]:
    return [(re.compile(pattern, re.IGNORECASE), becomes) for pattern, becomes in rules]


_HINT = re.compile(
    r"unchanged|unaltered|stable|prior|previous|earlier|interval|interim|compar|again|remain|since"
    r"|before|similar|than (?:on|in)\b|ha(?:s|ve) (?:\w+ )?(?:resolved|cleared)|persist"
    r"|re-?demonstrat|\bchanges?\b|no longer",
    re.IGNORECASE,
)
_RULES = _compiled(
    # The comparison itself.
    (
        rf"^(?:there (?:is|are) )?no (?:relevant |available )*(?:{_EARLIER}s?)\b(?:\s+(?:{_AROUND}"
        rf"|{_DATE}|x-{_HIDDEN}))*(?: (?:is|are))?(?: available)?(?: for (?:direct )?comparison)?$",
        "",
    ),
    (
        rf"^comparisons?\b(?!.*\b(?:{_ADVICE})\b):?(?:[\s,:]+(?:is|was|none|made|available|to|with|{_AROUND}|{_EARLIER}"
        rf"|{_DATE})(?![\w-]))*[\s,:]*",
        "",
    ),
    (rf"^{_BEFORE}\s*,\s*", ""),
    # Findings seen before.
    (rf"^(?:once )?again,? {_SEEN},? (is|are|was|were)\b", r"there \1"),
    (r"\bre-?demonstration of\b", ""),
    (r"\bre-?demonstrated\b", "demonstrated"),
    (rf"\b(?:was|were) {_SEEN} previously (?:and|but) ", ""),
    (rf"\b(?:as )?(?:previously|formerly) {_SEEN}\b|\b{_SEEN} previously\b", ""),
    (r",? ?\b(?:once )?again\b(?:, )?", " "),
    # Resolved findings, and no change.
    (
        rf"^(?:the )?{_WITHOUT_VERB} (?:is|are|was|were) no longer {_SEEN}(?: {_FROM})?{_END}",
        _none,
    ),
    (rf"^{_THERE}interval (?:complete )?(?:resolution|removal|clearing) of (?:the |an? )?", "no "),
    (rf",? ?\bwithout {_SLIGHT}changes?\b(?!,? (?:in|of)\b)(?:,? {_FROM})?", ""),
    (
        rf"^{_THERE}(?:no|little|minimal) {_SLIGHT}changes?(?:\s+{_FROM})?"
        rf"(?: (?:in|of) (?:the )?(?:{_LOOK})?|{_END})",
        "",
    ),
    # "No increase of an effusion" means there is one; "no development of one" means none.
    (
        rf"(?:^{_THERE}|\b)no (?:evidence (?:of|for) )?{_SLIGHT}interval {_WORSE} (?:in|of) "
        rf"(?:the )?(?:{_LOOK}|{_SIDE}(?! of\b)(?:,? {_FROM})?{_END})?",
        "",
    ),
    (rf"\bwithout {_SLIGHT}interval {_WORSE} (?:in|of) (?:the )?(?:{_LOOK})?", "with "),
    (rf"(?:^{_THERE}|\b){_SLIGHT}interval {_GROWTH} (?:in|of) (?:the )?(?:{_LOOK})?", ""),
    (rf"\s+(?P<be>has|have) {_DEGREE}{_GROWN}{_ASPECT}{_END}", _present),
    (
        rf"^{_CLEARED}(?:the )?{_WITHOUT_VERB} (?:has|have) {_WHOLLY}"
        rf"(?:resolved|cleared)(?: {_FROM})?{_END}",
        _none,
    ),
    # A state after a verb: together with another one, and alone.
    (rf",?\s+(?:and|but|though|which|that)\s+(?:(?:is|are|appears?) )?{_STATE}{_END_OR_WITH}", ""),
    (rf",?\s+(?:which|that)\s+(?:is|are|appears?) {_STATE}", ""),
    (rf"\b{_BE}\s+{_STATE},? (?:and|but)\s+(?!(?:{_VERB}|the|there)\b)", _is),
    (rf"\s+{_BE}\s+{_STATE},? as (?:is|are|was|were)\b", " and"),
    (rf"\s+{_BE}\s+{_STATE}(?=\s*(?:$|[,;)])|\s+(?:with|without|and|at|in|on|by)\b)", _present),
    (rf"(?:^|,?\s+){_STATE}{_END}", ""),
    # A state before a noun.
    (rf",?\s*\b(?:with|in) {_DEGREE}{_STABLE} {_SIDE}(?: {_FROM})?(?! of\b)", ""),
    (rf"\b{_DEGREE}{_STABLE}[- ](?:appearing )?{_LOOK}", ""),
    (rf"\b({_PLAIN}) (?:and|but) {_DEGREE}{_STABLE} (?=[\w\ue000-\uf8ff])", r"\1 "),
    (
        rf"\b{_DEGREE}{_STABLE}(?:,? and\b|,|-appearing)? (?:appearing )?(?=[\w(\[\ue000-\uf8ff])",
        "",
    ),
    (r"\b(?:persistent|persisting)(?:ly)?(?:,? and\b|,)? (?=[\w\ue000-\uf8ff])", ""),
    (r"^similar(?:[- ]appearing)? (?!to\b|in\b)", ""),
    (r"(?<!\bthe )\binterval (?=[\w\ue000-\uf8ff])", ""),
    (r"\b(?P<be>persists?)\b", _present),
    (r"(?<!the )\b(?P<be>remains?) (?=[\w\ue000-\uf8ff])", _is),
    # Other references to an earlier study.
    (
        r",?\s*(?:(?:which|that)\s+(?:\w+ly\s+)?)?"
        r"(?:(?:is|are|was|were|do(?:es)? not appear to be)\s+)?(?:also )?(?:not (?:well )?)?"
        rf"(?:better |best )?(?:{_SEEN}|appreciated)\s+(?:on|in|at)\s+{_PRIOR}"
        rf"(?:,? (?:and|but)(?= {_VERB}\b))?",
        "",
    ),
    (rf"(?:^|,?\s*\b){_BEFORE}(?![\w-])", ""),
    (rf",?\s*\b(?:versus|vs\.?|than(?: on)?|similar to)\s+{_PRIOR}", ""),
)

_TIDY = _compiled(
    (r"\(\s*[,;]?\s*\)", ""),
    (r"\s+", " "),
    (r" (?=[,;)])|(?<=\() ", ""),
    (r",(?=[,;])|;(?=;)", ""),
    (r"\ban (?=[bcdfgjklmnpqrstvwxyz][a-z])", "a "),
    (r"\ba (?=[aeio](?!ne\b))", "an "),
    (r"^(?:[\s,;:-]|(?:and|but|with)\b)+", ""),
    (r"(?:[\s,;:-]|\b(?:and|but|with|which|that|as|the|an?)\b)+$", ""),
)
_BARE = re.compile(r" (?P<be>is|are|was|were|has|have|appears?|remains?)$", re.IGNORECASE)
_NO_SUBJECT = re.compile(r"^(?P<subject>.+?) (?:is|are) present with (?=\w)", re.IGNORECASE)
_PUNCTUATION_BEHIND = re.compile(r"[\s.!?;:,]*$")
_LONGEST = 1000
_ITEM = re.compile(r"\d{1,2}[.)]")
_SAYS_NOTHING = frozenset(
    words(
        """
    a an the this these those it they and or of in to with within by at on is are was were be
    been has have there other as otherwise both present seen noted demonstrated heart hearts
    lung lungs chest mediastinum mediastinal cardiac cardiomediastinal cardiopulmonary hilar
    pulmonary bony osseous skeletal soft thoracic silhouette silhouettes contour contours size
    shape structures tissues tissue vasculature vascularity appearance configuration position
    exam examination study studies radiograph radiographs film pa ap lateral frontal portable
    view views image images findings finding fields hila hilum bones thorax remainder rest
    aeration inspiration volumes patient change changes interval comparison prior
    """
    )
)
"""Words that name no finding: a sentence of these alone said only that nothing changed."""


def remove_prior_references(report: str) -> str:
    """Remove references to earlier studies from a report; see the top of this file.

    A report with no other content becomes empty; one without such references is returned unchanged.
    Apply it before a cleaning step that drops punctuation.
    """
    if not _HINT.search(report):
        return report
    kept: list[str] = []
    same = True
    item = ""  # the list number of the next sentence
    for piece in split_at_stops(report):
        if _ITEM.fullmatch(piece):
            item = piece
            continue
        text = piece
        if _HINT.search(piece):
            parts = (_without_reference(part.strip()) for part in _parts(piece))
            text = " ".join(part for part in parts if part)
            same = same and text == piece
        if text:
            kept += [item, text]
        item = ""
    return report if same else " ".join(part for part in kept if part)


def _parts(text: str) -> list[str]:
    """Split a text into parts of at most `_LONGEST` characters, at blanks if possible.

    No real sentence is that long; the rules take superlinear time on longer text.
    """
    parts, start = [], 0
    while len(text) - start > _LONGEST:
        blank = text.rfind(" ", start + 1, start + _LONGEST)
        end = blank if blank > 0 else start + _LONGEST
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _without_reference(sentence: str) -> str:
    """A sentence without its references; an empty text if nothing is left to say."""
    end = _PUNCTUATION_BEHIND.search(sentence)
    assert end is not None  # it also matches an empty text
    body, hidden = _hide(sentence[: end.start()])
    before = body
    for pattern, becomes in _RULES:
        body = pattern.sub(becomes, body)
    if body == before:
        return sentence
    for pattern, becomes in _TIDY:
        body = pattern.sub(becomes, body)
    if (bare := _BARE.search(body)) is not None:
        body = body[: bare.start()] + _present(bare)
    if (found := _NO_SUBJECT.match(body)) is not None and _says_nothing(found["subject"]):
        body = f"there is {body[found.end() :]}"
    if _says_nothing(body):
        return ""
    if sentence[:1].isupper():
        body = body[:1].upper() + body[1:]
    return _shown(body, hidden) + end[0]


def _says_nothing(text: str) -> bool:
    return all(word in _SAYS_NOTHING for word in words(text.lower()))


def _hide(text: str) -> tuple[str, list[str]]:
    """Replace each run of marks by a character; returns the text and the runs."""
    runs: list[str] = []

    def character(match: re.Match[str]) -> str:
        runs.append(match[0])
        return chr(0xE000 + len(runs) - 1)

    return _RUN.sub(character, text), runs


def _shown(text: str, runs: list[str]) -> str:
    return re.sub(_HIDDEN, lambda match: runs[ord(match[0]) - 0xE000], text)


_PERSON = r"(?:(?:drs?|mrs?|ms)\b\.?\s*)?"
_PLACE = r"(?:dated|on|at|from|of|by|to|with|since|in|for|and|via|per)"
_NAME = (
    rf"{_PERSON}(?:\b\w+-)?(?:/{_HIDDEN}(?![-/'])"
    rf"|{_HIDDEN}(?:-(?:\w+|{_HIDDEN})|'[a-z]{{1,2}}\b)*/?)"
)
_MARKED = re.compile(_MARK)
_NAME_LAST = re.compile(
    rf"\s*(?:(?:\b{_PLACE}\s+){{0,3}}{_NAME}\s*){{1,9}}(?=[.,;:)]|$)", re.IGNORECASE
)
_NAME_FIRST = re.compile(rf"((?:^|[.!?])\s*){_NAME},?\s+([a-z])", re.IGNORECASE)
_NAME_ANYWHERE = re.compile(_NAME, re.IGNORECASE)
_TIDY_MARKED = _compiled(
    (r"\(\s*[,;]?\s*\)", ""),
    (r"\s+", " "),
    (r"([.,;:])(?:\s?[,;:])+", r"\1"),
    (r"(?:(?<=[.!?])|^)(?:\s*[.,;:])+(?=\s|$)", ""),
)


def remove_deidentification(report: str) -> str:
    """Remove de-identification marks from a report.

    These are `___` and `[** ... **]` of MIMIC and `XXXX` of Indiana University, with the letters
    and the parts of a date that it is joined to (`XXXXPM`, `8/14/XXXX`); a title in front
    (`Dr. ___`) is removed with them and, at the end of a clause, prepositions (`on ___ at ___`). A
    report without marks is returned unchanged. Apply it after `remove_prior_references`, which
    recognises a mark as the date of an earlier study.
    """
    if not _MARKED.search(report):
        return report
    return "".join(_without_marks(part) for part in _parts(report)).strip()


def _without_marks(text: str) -> str:
    capitals = text != text.lower()
    text = _NAME_LAST.sub("", _hide(text)[0])
    if capitals:
        text = _NAME_FIRST.sub(lambda match: match[1] + match[2].upper(), text)
    text = _NAME_ANYWHERE.sub("", text)
    for pattern, becomes in _TIDY_MARKED:
        text = pattern.sub(becomes, text)
    return text
