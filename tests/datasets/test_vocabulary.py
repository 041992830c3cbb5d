from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.datasets.vocabulary import run_vocabulary, train_vocabulary
from vilmedic.errors import DataError

REPORTS = ["No effusion.", "no Effusion seen", "heart, no effusion"]


def test_words_by_frequency_then_alphabet() -> None:
    for reports in (REPORTS, REPORTS[::-1]):
        vocabulary = train_vocabulary(reports, min_frequency=1).get_vocab()
        expected = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "effusion", "no", ",", ".", "heart", "seen"]
        assert sorted(vocabulary, key=vocabulary.__getitem__) == expected


def test_rare_words_have_no_id() -> None:
    tokenizer = train_vocabulary(REPORTS, min_frequency=2)
    assert tokenizer("no heart")["input_ids"] == [2, 5, 1, 3]
    assert len(tokenizer) == 6


def test_saved_vocabulary_reads_back_the_same(tmp_path: Path) -> None:
    settings = {"processing": None, "min_frequency": 1}
    made = run_vocabulary(tmp_path, REPORTS, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    for reports in (REPORTS, None):
        read = run_vocabulary(tmp_path, reports, **settings)
        assert read.get_vocab() == made.get_vocab()
        assert read("No heart!")["input_ids"] == made("No heart!")["input_ids"]
        assert (read.pad_token_id, read.cls_token_id, read.sep_token_id) == (0, 2, 3)


def test_vocabulary_of_another_training_is_refused(tmp_path: Path) -> None:
    run_vocabulary(tmp_path, REPORTS, processing=None, min_frequency=1)
    with pytest.raises(DataError, match="other processing, min_frequency than"):
        run_vocabulary(tmp_path, REPORTS, processing="ifcc_clean_report", min_frequency=2)
    with pytest.raises(DataError, match="other reports than"):
        run_vocabulary(tmp_path, REPORTS[:2], processing=None, min_frequency=1)


def test_a_language_without_spaces_has_words_too() -> None:
    tokenizer = train_vocabulary(["两肺清晰，心影不大。", "左肺炎症。"], min_frequency=1)
    unseen = tokenizer("心影清晰，两肺大。")["input_ids"]
    assert tokenizer.unk_token_id not in unseen
    assert len(unseen) == 9 + 2
