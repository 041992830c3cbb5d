from __future__ import annotations

import pytest

from vilmedic.preparation.labels import CHEXPERT_LABELS, present_labels

NAMES = ("Atelectasis", "Cardiomegaly", "No Finding")


@pytest.mark.parametrize(
    ("uncertain", "labels"),
    [
        ("negative", ("No Finding",)),
        ("positive", ("Atelectasis", "Cardiomegaly")),
        ("mixed", ("Atelectasis",)),
        ("drop", None),
    ],
)
def test_uncertain_labels(uncertain: str, labels: tuple[str, ...] | None) -> None:
    assert present_labels(["-1.0", "-1", ""], NAMES, uncertain) == labels


def test_certain_labels_do_not_depend_on_the_policy() -> None:
    for uncertain in ("negative", "positive", "mixed", "drop"):
        assert present_labels(["1.0", "0.0", ""], NAMES, uncertain) == ("Atelectasis",)
        assert present_labels(["", "0", "1"], NAMES, uncertain) == ("No Finding",)
        assert present_labels(["", "", ""], NAMES, uncertain) == ("No Finding",)


@pytest.mark.parametrize("value", ["2.0", "yes", "nan", "0.5"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"'{value}' is no label value"):
        present_labels([value, "", ""], NAMES, "negative")


def test_the_fourteen_labels() -> None:
    assert len(set(CHEXPERT_LABELS)) == 14
    assert list(CHEXPERT_LABELS) == sorted(CHEXPERT_LABELS)
