from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.factories import tiny_tokenizer
from vilmedic.datasets.sample import SampleKey
from vilmedic.datasets.text import TextDataset
from vilmedic.datasets.words import has_word_boundaries, special_tokens_around, word_numbers

REPORT = "No pleural effusion. Heart-size is normal"
PIECES = ["effus", "##ion", "pl", "##eu", "##ral", "no", "heart", "-", "size", "is", "normal", "."]


def word_pieces() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {piece: number for number, piece in enumerate([*specials, *PIECES])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def byte_pairs() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([REPORT] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def sentence_pieces(*, split: bool = True) -> PreTrainedTokenizerFast:
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁No": -2.0, "▁pleural": -3.0}
    letters = dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzNH.-", -9.0)
    tokenizer = Tokenizer(models.Unigram(list((scores | letters).items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


Make = Callable[[], PreTrainedTokenizerFast]


@pytest.fixture
def dataset(text_args: Callable[..., dict[str, Any]], tmp_path: Any) -> Callable[..., TextDataset]:
    def make(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> TextDataset:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return TextDataset(**text_args(tokenizer=str(tmp_path / "tokenizer"), **changes))

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (word_pieces, "[CLS] No pleural effusion . Heart - size is normal [SEP]"),
        (byte_pairs, "<s> No pleural effusion . Heart - size is normal </s>"),
        (sentence_pieces, "No pleural effusion. Heart-size is normal </s>"),
        (tiny_tokenizer, "[CLS] No pleural effusion . Heart - size is normal [SEP]"),
    ],
)
def test_words_are_those_of_the_report(
    dataset: Callable[..., TextDataset], make: Make, words: str
) -> None:
    data = dataset(make())
    assert data.words(REPORT) == words.split()
    batch = data.encode_text([REPORT, "No"])
    used = batch["attention_mask"].bool()
    assert (batch["word_ids"][~used] == -1).all()
    numbers = batch["word_ids"][0, used[0]].tolist()
    assert sorted(set(numbers)) == list(range(len(words.split())))
    assert numbers == sorted(numbers)


def test_pieces_of_a_word_share_its_number(dataset: Callable[..., TextDataset]) -> None:
    data = dataset(word_pieces())
    batch = data.encode_text(["pleural effusion."])
    assert data.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])[:8] == [
        *("[CLS]", "pl", "##eu", "##ral", "effus", "##ion", ".", "[SEP]")
    ]
    assert batch["word_ids"][0].tolist() == [0, 1, 1, 1, 2, 2, 3, 4]


def test_samples_and_prompts_have_the_same_words(dataset: Callable[..., TextDataset]) -> None:
    data = dataset(byte_pairs())
    batch = data.collate([data[SampleKey(0)], data[SampleKey(3)]])
    again = data.encode_text([data.describe(0)["report"], data.describe(3)["report"]])
    assert batch["word_ids"].tolist() == again["word_ids"].tolist()


def test_a_cut_report_keeps_its_closing_token(dataset: Callable[..., TextDataset]) -> None:
    data = dataset(word_pieces(), tokenizer_max_len=6)
    assert data.encode_text(["pleural effusion."])["word_ids"].tolist() == [[0, 1, 1, 1, 2, 3]]
    assert data.words("pleural effusion.") == ["[CLS]", "pleural", "effus", "[SEP]"]


def test_two_special_tokens_are_two_words() -> None:
    assert word_numbers([None, None, 0, 0, 1, None, None]) == [0, 1, 2, 2, 3, 4, 5]


def test_special_tokens_and_word_boundaries_are_known() -> None:
    assert special_tokens_around(word_pieces()) == (1, 1)
    assert special_tokens_around(sentence_pieces()) == (0, 1)
    for make in (word_pieces, byte_pairs, sentence_pieces, tiny_tokenizer):
        assert has_word_boundaries(make())
    assert not has_word_boundaries(sentence_pieces(split=False))
