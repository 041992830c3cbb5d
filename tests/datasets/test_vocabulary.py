from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer

from vilmedic.datasets.text import TextDataset
from vilmedic.datasets.vocabulary import read_word_list, run_vocabulary, train_vocabulary
from vilmedic.errors import DataError

REPORTS = ["No effusion.", "no Effusion seen", "heart, no effusion"]


WORDS = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", ".", "No", "effusion", "no"]


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


def test_another_vocabulary_in_the_run_directory_is_refused(tmp_path: Path) -> None:
    run_vocabulary(tmp_path, REPORTS, processing=None, min_frequency=1)
    with pytest.raises(DataError, match="other processing, min_frequency than"):
        run_vocabulary(tmp_path, REPORTS, processing="ifcc_clean_report", min_frequency=2)
    with pytest.raises(DataError, match="other reports than"):
        run_vocabulary(tmp_path, REPORTS[:2], processing=None, min_frequency=1)


def test_languages_without_spaces_have_words() -> None:
    tokenizer = train_vocabulary(["两肺清晰，心影不大。", "左肺炎症。"], min_frequency=1)
    unseen = tokenizer("心影清晰，两肺大。")["input_ids"]
    assert tokenizer.unk_token_id not in unseen
    assert len(unseen) == 9 + 2


@pytest.mark.parametrize("min_frequency", [1, 2, 5])
def test_counting_equals_the_trainer_of_tokenizers(min_frequency: int) -> None:
    """With accents, combining marks, rare spaces and text that looks like special tokens."""
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


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpt" / "dalle"
    folder.mkdir(parents=True)
    (folder / "vocab.src").write_text("\n".join(WORDS))
    (tmp_path / "test.report.tok").write_text("No effusion .\nno pneumothorax .\n")
    return folder


def dataset(run_dir: Path, **options: str) -> TextDataset:
    return TextDataset(
        split="test",
        training=False,
        seed=0,
        run_dir=run_dir,
        root=str(run_dir.parents[1]),
        **options,
    )


def test_the_word_list_of_a_run_is_read_unchanged(run_dir: Path) -> None:
    data = dataset(run_dir)

    batch = data.encode_text(["No effusion .", "no pneumothorax"])

    assert batch["input_ids"][:, :3].tolist() == [[6, 7, 5], [8, 3, 1]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2]
    assert data.spec.filler == 1
    assert data.spec.vocab_size == len(WORDS)


def test_a_word_list_can_be_configured(run_dir: Path, tmp_path: Path) -> None:
    data = dataset(run_dir.parent / "run", tokenizer=str(run_dir / "vocab.src"))
    assert data.spec.filler == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(WORDS[1:], r"has no \[CLS\]"), ([*WORDS, "no"], r"repeats a word \(line 9: 'no'\)")],
)
def test_invalid_word_lists_are_refused(tmp_path: Path, words: list[str], complaint: str) -> None:
    path = tmp_path / "vocab.src"
    path.write_text("\n".join(words) + "\n")
    with pytest.raises(DataError, match=complaint):
        read_word_list(path)


def test_a_word_list_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.src"
    path.write_bytes("\n".join([*WORDS, "neumotórax"]).encode("latin-1"))
    with pytest.raises(DataError, match=r"vocab\.src: not a word list that can be read: 'utf-8'"):
        read_word_list(path)
