"""Removal of references to earlier studies: sentences with their expected result."""

from __future__ import annotations

import re
import tarfile
import xml.etree.ElementTree as ElementTree

import pytest

from tests.datasets.test_real import folder
from vilmedic.datasets.lines import words
from vilmedic.datasets.report_text import clean, remove_deidentification, remove_prior_references

PRIOR = [
    # Statements of the comparison.
    ("As compared to the previous radiograph, there is no relevant change.", ""),
    ("Comparison: ___. Lungs are clear.", "Lungs are clear."),
    ("Comparison XXXX, XXXX Well-expanded and clear lungs.", "Well-expanded and clear lungs."),
    ("No prior studies available for comparison. No effusion.", "No effusion."),
    ("PA and lateral views are compared to previous exam from ___.", ""),
    (
        "In comparison with the study of ___, there is a left effusion.",
        "There is a left effusion.",
    ),
    ("Comparison chest radiograph is recommended.", "Comparison chest radiograph is recommended."),
    # Only statements of no change.
    ("Unchanged. No change. Stable. This is unchanged.", ""),
    ("The heart size is stable. Stable cardiomediastinal silhouette.", ""),
    ("The heart and lungs have XXXX XXXX in the interval. Lungs are clear.", "Lungs are clear."),
    ("Stable appearance of the chest.", ""),
    (
        "1. Unchanged cardiomegaly. 2. No change. 3. No effusion.",
        "1. Cardiomegaly. 3. No effusion.",
    ),
    # Adjectives of change before a finding are removed.
    ("Stable mild cardiomegaly.", "Mild cardiomegaly."),
    ("There is a stable ill-defined opacity.", "There is an ill-defined opacity."),
    ("There is an unchanged small effusion.", "There is a small effusion."),
    ("Normal and stable cardiomediastinal contours.", "Normal cardiomediastinal contours."),
    ("Stable, mild left-sided volume loss.", "Mild left-sided volume loss."),
    ("Stable position of right central venous catheter.", "Right central venous catheter."),
    ("Persistent right basilar opacity.", "Right basilar opacity."),
    ("Cardiomegaly and stable mediastinal masses.", "Cardiomegaly and mediastinal masses."),
    # Verbs of change.
    ("The effusion is unchanged", "The effusion is present"),
    ("Effusions are smaller than on ___.", "Effusions are present."),
    (
        "Right pleural effusion, unchanged since ___, with oedema.",
        "Right pleural effusion, with oedema.",
    ),
    ("The cardiac silhouette is enlarged but unchanged.", "The cardiac silhouette is enlarged."),
    ("Heart size is stable and within normal limits.", "Heart size is within normal limits."),
    ("The mediastinum is stable with aortic tortuosity.", "There is aortic tortuosity."),
    (
        "Cardiomegaly is stable, and there is mild edema.",
        "Cardiomegaly is present, and there is mild edema.",
    ),
    ("Mild edema has improved since the prior study.", "Mild edema is present."),
    ("Biapical thickening, grossly unchanged from prior.", "Biapical thickening."),
    (
        "The aorta remains tortuous. The lungs remain clear.",
        "The aorta is tortuous. The lungs are clear.",
    ),
    ("Right basal opacity persists.", "Right basal opacity is present."),
    ("The tube is in unchanged position.", "The tube is present."),
    # Findings seen before, new in the interval, or resolved.
    ("Again seen is a left basilar opacity.", "There is a left basilar opacity."),
    ("Calcified granulomas are again noted.", "Calcified granulomas are noted."),
    ("The previously seen nodule measures 5 mm.", "The nodule measures 5 mm."),
    ("As before, there is a left effusion.", "There is a left effusion."),
    ("In the interval, an infiltrate has developed.", "An infiltrate has developed."),
    ("Right apical scarring as before.", "Right apical scarring."),
    ("There is a nodule, not seen on prior exams.", "There is a nodule."),
    ("There has been interval development of a large effusion.", "A large effusion."),
    ("No significant interval change in the bilateral effusions.", "Bilateral effusions."),
    ("Interval removal of the right PICC.", "No right PICC."),
    ("Pneumothorax is no longer seen.", "No pneumothorax."),
    ("The left lower lobe opacity has resolved.", "No left lower lobe opacity."),
    # After r2gen_clean_report.
    ("heart is stable . again seen is an effusion , unchanged .", "there is an effusion ."),
    # Text without a reference is unchanged.
    (
        "Prior CABG.  Previous granulomatous disease.",
        "Prior CABG.  Previous granulomatous disease.",
    ),
    ("Patient is clinically stable.", "Patient is clinically stable."),
    ("No new consolidation. New right effusion.", "No new consolidation. New right effusion."),
    ("Degenerative changes of the spine.", "Degenerative changes of the spine."),
    ("The remainder of the lungs is clear.", "The remainder of the lungs is clear."),
    ("Right greater than left opacities.", "Right greater than left opacities."),
    ("Widened compared to the left.", "Widened compared to the left."),
    ("", ""),
]


PRESENT_OR_NOT = [
    # A finding that has not grown is present; one that has not developed is not.
    ("No interval increase in the pleural effusion.", "Pleural effusion."),
    ("There has been no interval worsening of edema.", "Edema."),
    ("No evidence of interval enlargement of the nodule.", "Nodule."),
    ("Small effusion, no interval increase or decrease in size.", "Small effusion."),
    ("Cardiomegaly without interval worsening of edema.", "Cardiomegaly with edema."),
    ("No interval development of pneumothorax.", "No pneumothorax."),
    # A finding that has not or only partly resolved is present.
    ("Pneumothorax has not resolved since prior.", "Pneumothorax has not resolved."),
    ("The effusion has largely resolved.", "The effusion has largely resolved."),
    ("The effusion has completely resolved since prior.", "No effusion."),
    # Lungs that have cleared are still mentioned.
    ("The lungs have cleared.", "The lungs have cleared."),
    ("The left lower lobe has cleared.", "The left lower lobe has cleared."),
    ("The pneumonia has cleared.", "No pneumonia."),
    # Statements about other structures are unchanged.
    (
        "The heart is enlarged and the effusion is no longer seen.",
        "The heart is enlarged and the effusion is no longer seen.",
    ),
    (
        "The heart is enlarged and edema has resolved.",
        "The heart is enlarged and edema has resolved.",
    ),
    # The result is still a sentence.
    ("The cardiac silhouette is, again, enlarged.", "The cardiac silhouette is enlarged."),
    (
        "Nodules were not present on the prior study and may represent infection.",
        "Nodules may represent infection.",
    ),
]


@pytest.mark.parametrize(("report", "expected"), [*PRIOR, *PRESENT_OR_NOT])
def test_prior_references(report: str, expected: str) -> None:
    assert remove_prior_references(report) == expected
    assert remove_prior_references(expected) == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Seen with Dr. ___ by ___ on ___ at ___. No effusion.", "Seen. No effusion."),
        (
            "In comparison with the study of ___, a nodule.",
            "In comparison with the study, a nodule.",
        ),
        ("On [**2104-3-2**] by Dr. [**Last Name (STitle) 12**], no change.", "no change."),
        ("XXXX sternotomy wires are intact.", "Sternotomy wires are intact."),
        ("xxxx sternotomy wires .", "sternotomy wires ."),
        ("XXXX, XXXX. Clear lungs.", "Clear lungs."),
        ("___ year old woman (___) with cough", "year old woman with cough"),
        ("Chest x-XXXX, normal  heart.", "Chest, normal heart."),
        ("Reported at XXXXPM XXXX/XXXX. Clear lungs.", "Reported. Clear lungs."),
        ("clear lungs xxxxpm .", "clear lungs."),
        ("Pain. ComparisXXXX/11", "Pain."),
        ("Obtained on 02/010/XXXX. Clear.", "Obtained. Clear."),
        ("These XXXX't contours and the XXXXth rib.", "These contours and the rib."),
        ("Old XXXX/granulomas or pneumonia/XXXX.", "Old granulomas or pneumonia."),
        ("Cough/XXXX/weakness with XXXX-A-XXXX.", "Cough/weakness."),
        ("Size XXXL, 1/2 of XX.", "Size XXXL, 1/2 of XX."),
        ("___", ""),
        ("Some  words_with marks, X and XX.", "Some  words_with marks, X and XX."),
    ],
)
def test_deidentification(report: str, expected: str) -> None:
    assert remove_deidentification(report) == expected
    assert remove_deidentification(expected) == expected


@pytest.mark.parametrize(
    "repeated",
    [
        "___ ",
        "XXXX ",
        "XXXXa",
        "1/XXXX/",
        "[** ",
        "on ___ ",
        "the prior ",
        "is stable, ",
        "stable and ",
        "\ue000",
    ],
)
def test_a_sentence_of_100_kilobytes_needs_linear_time(repeated: str) -> None:
    text = "Unchanged clear lungs on ___. Stable " + repeated * (100_000 // len(repeated)) + "x"
    for name in ("remove_prior_references", "remove_deidentification"):
        assert clean(name, text).casefold().find("clear lungs") >= 0


def test_findings_of_indiana_reports_are_kept() -> None:
    """Findings are kept, and only the few words that a sentence needs are added."""
    added = {"there", "is", "are", "present", "no", "a", "an", "demonstrated", "and"}
    changed = 0
    left = 0
    reference = re.compile(
        r"\b(?:unchanged|as before|since the (?:prior|previous)"
        r"|compared (?:to|with) (?:the )?prior)\b",
        re.I,
    )
    with tarfile.open(folder("indiana") / "NLMCXR_reports.tgz") as archive:
        for number, member in enumerate(archive):
            if number % 8 or not member.name.endswith(".xml"):
                continue
            file = archive.extractfile(member)
            assert file is not None
            texts = [one.text or "" for one in ElementTree.parse(file).iter("AbstractText")]
            report = " ".join(" ".join(texts[-2:]).split())
            cleaned = remove_prior_references(report)
            assert set(words(cleaned.lower())) <= set(words(report.lower())) | added
            changed += cleaned != report
            left += bool(reference.search(cleaned))
            marked = remove_deidentification(cleaned)
            assert not re.search(r"X{3}|_{2}", marked)
    assert changed > 90
    assert left <= 1
