from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilmedic.datasets.scripts import words
from vilmedic.datasets.vocabulary import train_vocabulary


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no pleural effusion.", ["no", "pleural", "effusion"]),
        ("neumotórax izquierdo", ["neumotórax", "izquierdo"]),
        ("胸部CT检查，2型", ["胸", "部", "CT", "检", "查", "2", "型"]),
        ("両肺のレントゲン", ["両", "肺", "の", "レントゲン"]),
        ("ปอดปกติ", ["ป", "อ", "ด", "ป", "ก", "ติ"]),
        ("양측 폐야", ["양측", "폐야"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    tokenizer = train_vocabulary([text], min_frequency=1)
    tokens = tokenizer.tokenize(text)
    assert [token for token in tokens if token not in ".，"] == [word.lower() for word in expected]


@given(st.text(st.characters(max_codepoint=0xDFF)))
def test_words_of_scripts_with_spaces_are_runs_of_letters(text: str) -> None:
    assert words(text) == re.findall(r"\w+", text)


@given(st.text())
def test_no_letter_is_lost(text: str) -> None:
    joined = "".join(words(text))  # vowel signs, which Python takes for no letters, among them
    assert re.findall(r"\w", joined) == re.findall(r"\w", text)
