from __future__ import annotations

import pytest

from vilmedic.preparation.sections import Sections, choose_text, find_sections

PLAIN = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old with cough  // pneumonia?

 TECHNIQUE:  Two views of the chest.

 COMPARISON:  None.

 FINDINGS:

 The lungs are clear.  No effusion
 is seen.

 IMPRESSION:

 No acute process.
"""


def test_a_report_in_the_usual_form() -> None:
    assert find_sections(PLAIN) == Sections(
        "The lungs are clear. No effusion is seen.", "No acute process."
    )


@pytest.mark.parametrize(
    "heading",
    [
        " FINDINGS:",
        " FINDING:",
        "FINDINGS :",
        "\tFindings:",
        " FINDNIGS:",
        " FINDIGS:",
        " FINDINGS",
        " PORTABLE CHEST:",
        " CHEST, TWO VIEWS:",
        " AP AND LATERAL VIEWS OF THE CHEST:",
        " REFERENCE FINDINGS:",
        " FINDINGS;",
        " FINDINGS -",
    ],
)
def test_spellings_of_findings(heading: str) -> None:
    text = f" HISTORY:  Fever.\n{heading}\n The heart is large.\n\n IMPRESSION:  Cardiomegaly."
    assert find_sections(text) == Sections("The heart is large.", "Cardiomegaly.")


@pytest.mark.parametrize(
    "heading",
    [
        " IMPRESSION:",
        "Impression:",
        " IMPRESSOIN:",
        " IMRPESSION:",
        " MPRESSION:",
        " IMPRESSIONS:",
        " CONCLUSION:",
        " IMPRESSION",
        " FINAL IMPRESSION:",
        " IMPRESSION;",
        " IMPRESSION - ",
        "IMPRESSION- ",
    ],
)
def test_spellings_of_impression(heading: str) -> None:
    text = f" FINDINGS:  The heart is large.\n\n{heading}\n Cardiomegaly.\n"
    assert find_sections(text) == Sections("The heart is large.", "Cardiomegaly.")


def test_a_joint_heading_is_an_impression() -> None:
    for heading in ("FINDINGS AND IMPRESSION", "FINDINGS/IMPRESSION", "FINDINGS / IMPRESSION"):
        assert find_sections(f" {heading}:  Clear lungs.") == Sections("", "Clear lungs.")


def test_a_heading_in_the_middle_of_a_line() -> None:
    text = " FINDINGS: Clear lungs. IMPRESSION: Normal chest."
    assert find_sections(text) == Sections("Clear lungs.", "Normal chest.")


def test_semicolons_and_dashes_after_headings() -> None:
    text = " FINDINGS; Clear lungs; no effusion - as before.\n\n IMPRESSION - Normal.\n"
    expected = Sections("Clear lungs; no effusion - as before.", "Normal.")
    assert find_sections(text) == expected
    one_line = " FINDINGS; Clear lungs; no effusion - as before. IMPRESSION - Normal."
    assert find_sections(one_line) == expected


def test_subheadings_stay_in_the_findings() -> None:
    text = """ FINDINGS:
 LUNGS: Clear.
 HEART AND MEDIASTINUM: Normal size.
 Lines: none.

 IMPRESSION: Normal.

 NOTIFICATION:  Told to the nurse by telephone."""
    assert find_sections(text) == Sections(
        "LUNGS: Clear. HEART AND MEDIASTINUM: Normal size. Lines: none.", "Normal."
    )


def test_a_sentence_with_a_colon_is_not_a_heading() -> None:
    text = " IMPRESSION:\n Two changes since yesterday:\n 1. Smaller effusion.\n 2. New tube."
    got = find_sections(text).impression
    assert got == "Two changes since yesterday: 1. Smaller effusion. 2. New tube."


def test_sentences_that_start_like_headings() -> None:
    text = " Findings\n Clear lungs.\n Note: the apices are cut off.\n Views: two.\n"
    text += "\n Impression\n Fine."
    assert find_sections(text) == Sections(
        "Clear lungs. Note: the apices are cut off. Views: two.", "Fine."
    )
    wrapped = " IMPRESSION: No other\n findings\n of note."
    assert find_sections(wrapped) == Sections("", "No other findings of note.")


def test_recommendations_and_wet_reads_are_excluded() -> None:
    text = """ WET READ: ___ 10:10 PM
  Large effusion.
 ______________________________________________________________________________
                                 FINAL REPORT
 INDICATION:  Pain.

 IMPRESSION:  Small effusion.

 RECOMMENDATION(S):  Follow up in a month."""
    assert find_sections(text) == Sections("", "Small effusion.")


def test_the_last_non_empty_section_is_used() -> None:
    text = " FINDINGS: First.\n IMPRESSION: One.\n FINDINGS: Second.\n IMPRESSION:\n"
    assert find_sections(text) == Sections("Second.", "One.")


def test_reports_without_headings_use_the_body_text() -> None:
    after = " HISTORY:  Fever.\n\n The lungs are clear. The heart is normal.\n"
    assert find_sections(after) == Sections(rest="The lungs are clear. The heart is normal.")
    in_comparison = " COMPARISON:  The heart is larger than it was last week.\n"
    assert find_sections(in_comparison).rest == "The heart is larger than it was last week."
    plain = "The lungs are clear and the heart is normal."
    assert find_sections(plain).rest == plain


@pytest.mark.parametrize(
    "text", ["", " \n", "                FINAL REPORT\n", " IMPRESSION:\n ___\n"]
)
def test_empty_reports(text: str) -> None:
    assert find_sections(text) == Sections()


def test_line_ends_of_other_systems() -> None:
    assert find_sections(PLAIN.replace("\n", "\r\n")) == find_sections(PLAIN)


def test_sections_are_combined_for_training() -> None:
    both = Sections("Seen.", "Meant.")
    assert choose_text(both, "both") == "Meant. Seen."
    assert choose_text(both, "findings") == "Seen."
    assert choose_text(both, "impression") == "Meant."
    assert choose_text(Sections("Seen."), "both") == "Seen."
    assert choose_text(Sections("Seen."), "impression") == ""
    assert choose_text(Sections(rest="Text."), "both") == "Text."
    assert choose_text(Sections(rest="Text."), "both", unheaded=False) == ""
    assert choose_text(Sections(rest="Text."), "findings") == ""


def test_a_negated_findings_sentence_is_not_a_heading() -> None:
    text = " FINDINGS: The heart is normal.\n NO ACUTE FINDINGS: lungs are clear.\n"
    assert find_sections(text).findings == (
        "The heart is normal. NO ACUTE FINDINGS: lungs are clear."
    )
    alone = "NO ACUTE FINDINGS: lungs are clear on both sides.\n"
    assert find_sections(alone) == Sections(rest=alone.strip())
    number = " FINDINGS: Clear lungs.\n ACCESSION NO: 12\n"
    assert find_sections(number).findings == "Clear lungs. ACCESSION NO: 12"


def test_a_date_does_not_end_the_findings() -> None:
    text = " FINDINGS: Compared with the film of\n DATE: ___, the effusion is smaller.\n"
    text += " IMPRESSION: Better.\n"
    assert find_sections(text) == Sections(
        "Compared with the film of DATE: ___, the effusion is smaller.", "Better."
    )


def test_a_summary_after_the_impression_is_ignored() -> None:
    text = " IMPRESSION: Small effusion.\n END OF IMPRESSION:\n SUMMARY: Told by telephone.\n"
    assert find_sections(text) == Sections("", "Small effusion.")
    again = text + " IMPRESSION: Large effusion.\n"
    assert find_sections(again) == Sections("", "Large effusion.")
    alone = " END OF IMPRESSION\n SUMMARY: Small effusion.\n"
    assert find_sections(alone) == Sections("", "Small effusion.")


@pytest.mark.parametrize(
    "line", ["A:\n", "FINDINGS:\n", "FINDINGS ;", "-----x\n", "\n \n", ": ", "IMPRESSION ", "\t"]
)
def test_a_megabyte_report_is_read_in_linear_time(line: str) -> None:
    text = "IMPRESSION: Clear lungs.\n EXAM: chest\n" + line * (2**20 // len(line))
    assert find_sections(text).impression == "Clear lungs."


def test_many_different_names_before_colons() -> None:
    names = "".join(f"N{number:06} ABCDEFG:\n" for number in range(70_000))
    text = f" FINDINGS: Clear lungs.\n{names} IMPRESSION: Normal.\n IMPRESSOIN: Not one any more.\n"
    found = find_sections(text)
    assert found.findings.startswith("Clear lungs. N000000 ABCDEFG:")
    assert found.impression == "Normal. IMPRESSOIN: Not one any more."
