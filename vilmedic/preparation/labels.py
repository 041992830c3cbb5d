"""The 14 labels of CheXpert and MIMIC-CXR, and what to do with uncertain ones."""

from __future__ import annotations

from collections.abc import Sequence

NO_FINDING = "No Finding"
CHEXPERT_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    NO_FINDING,
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
UNCERTAIN = ("negative", "positive", "mixed", "drop")
# Of the five competition labels, those that GLoRIA counts as present, after Irvin et al. 2019.
MIXED_POSITIVE = frozenset({"Atelectasis", "Edema", "Pleural Effusion"})
_NUMBERS = {"": 0, "1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1}


def present_labels(
    values: Sequence[str], names: Sequence[str], uncertain: str
) -> tuple[str, ...] | None:
    """The labels that count as present in a row of a label table.

    Args:
        values: one a label: `1.0` is present, `0.0` absent, `-1.0` uncertain, blank not mentioned.
        names: the labels.
        uncertain: `negative` counts uncertain labels as absent, `positive` as present, `mixed` as
            present for atelectasis, edema and pleural effusion only, and `drop` refuses the row.

    Returns:
        The names, in the order given; `No Finding` when nothing is present; None when the row is
        refused.

    Raises:
        ValueError: a value is none of the four.
    """
    present = []
    for name, value in zip(names, values, strict=True):
        number = _number(value)
        if number == -1:
            if uncertain == "drop":
                return None
            if uncertain == "positive" or (uncertain == "mixed" and name in MIXED_POSITIVE):
                present.append(name)
        elif number == 1:
            present.append(name)
    return tuple(present) or (NO_FINDING,)


def _number(value: str) -> int:
    try:
        return _NUMBERS[value]
    except KeyError:
        raise ValueError(f"'{value}' is no label value; allowed are 1, 0, -1 and blank") from None
