from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer

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


@pytest.mark.parametrize("min_frequency", [1, 2, 5])
def test_counting_gives_the_vocabulary_of_the_trainer(min_frequency: int) -> None:
    """Of texts with accents, marks that combine, rare spaces and what looks like special tokens."""
    random = np.random.default_rng(0)
    pieces = [
        *"abcdeABCDE.,-:;()'/0123 \u00e9\u0301\u00df\u0130\u03a3\u00a0\u2003\t\x1c\x85[]_\u200b",
        "[PAD]",
    ]
    reports = ["".join(random.choice(pieces, 40)) for _ in range(500)]
    trained = Tokenizer(WordLevel(unk_token="[UNK]"))
    made = train_vocabulary(reports, min_frequency=min_frequency)
    trained.normalizer = made.backend_tokenizer.normalizer
    trained.pre_tokenizer = made.backend_tokenizer.pre_tokenizer
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = WordLevelTrainer(
        vocab_size=10**6, min_frequency=min_frequency, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(reports, trainer)
    assert made.get_vocab() == trained.get_vocab()
