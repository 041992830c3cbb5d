from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.datasets.text import TextDataset
from vilmedic.datasets.word_list import read_word_list
from vilmedic.errors import DataError

WORDS = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", ".", "No", "effusion", "no"]


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


def test_the_list_of_a_run_is_read_as_it_was(run_dir: Path) -> None:
    data = dataset(run_dir)

    batch = data.encode_text(["No effusion .", "no pneumothorax"])

    assert batch["input_ids"][:, :3].tolist() == [[6, 7, 5], [8, 3, 1]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2]
    assert data.spec.filler == 1
    assert data.spec.vocab_size == len(WORDS)


def test_a_list_can_be_named(run_dir: Path, tmp_path: Path) -> None:
    data = dataset(run_dir.parent / "run", tokenizer=str(run_dir / "vocab.src"))
    assert data.spec.filler == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(WORDS[1:], r"has no \[CLS\]"), ([*WORDS, "no"], r"repeats a word \(line 9: 'no'\)")],
)
def test_other_files_are_refused(tmp_path: Path, words: list[str], complaint: str) -> None:
    path = tmp_path / "vocab.src"
    path.write_text("\n".join(words) + "\n")
    with pytest.raises(DataError, match=complaint):
        read_word_list(path)


def test_a_list_in_another_character_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.src"
    path.write_bytes("\n".join([*WORDS, "neumotórax"]).encode("latin-1"))
    with pytest.raises(DataError, match=r"vocab\.src: not a word list that can be read: 'utf-8'"):
        read_word_list(path)
