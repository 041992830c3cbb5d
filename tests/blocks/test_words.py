from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.datasets.test_text import REPORT, byte_pairs, sentence_pieces, word_pieces
from tests.factories import TINY_BERT, tiny_spec, tiny_tokenizer
from vilmedic.blocks.words import WordEncoder
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.text import word_numbers
from vilmedic.errors import ConfigError

LAYERS = {**TINY_BERT, "num_hidden_layers": 3, "hidden_dropout_prob": 0.0}


def encode(tokenizer: Any, reports: list[str], length: int = 48) -> dict[str, torch.Tensor]:
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "word_ids": []}
    for report in reports:
        encoding = tokenizer(report).encodings[0]
        rest = length - len(encoding.ids)
        batch["input_ids"].append(encoding.ids + [tokenizer.pad_token_id] * rest)
        batch["attention_mask"].append([1] * len(encoding.ids) + [0] * rest)
        batch["word_ids"].append(word_numbers(encoding.word_ids) + [-1] * rest)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def slow_words(
    encoder: WordEncoder, batch: dict[str, torch.Tensor], row: int, closing: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Words and report as the paper's code has them: token by token, layer by layer."""
    used = int(batch["attention_mask"][row].sum())
    output = encoder.text.network(
        input_ids=batch["input_ids"][row : row + 1, :used], output_hidden_states=True
    )
    layers = output.hidden_states[-encoder.last_n_layers :]
    by_layer = []
    for states in layers:
        words: list[torch.Tensor] = []
        previous = None
        for token in range(used):
            number = int(batch["word_ids"][row, token])
            if number == previous:
                words[-1] = words[-1] + states[0, token]
            else:
                words.append(states[0, token])
            previous = number
        by_layer.append(torch.stack(words))
    report = torch.stack([words.mean(dim=0) for words in by_layer]).sum(dim=0)
    summed = torch.stack(by_layer).sum(dim=0)
    return list(summed[: len(summed) - closing]), report


@pytest.mark.parametrize(
    ("make", "closing"),
    [(word_pieces, 1), (byte_pairs, 1), (sentence_pieces, 1), (tiny_tokenizer, 1)],
)
def test_words_are_summed_pieces_for_any_tokenizer(make: Any, closing: int) -> None:
    tokenizer = make()
    spec = DataSpec(tokenizer=tokenizer, tokenizer_max_len=48)
    encoder = WordEncoder(spec=spec, last_n_layers=2, **LAYERS).double().eval()
    batch = encode(tokenizer, [REPORT, "effusion", "No heart"])
    encoded = encoder(**batch)
    for row in range(3):
        words, report = slow_words(encoder, batch, row, closing)
        assert int(encoded.mask[row].sum()) == len(words)
        torch.testing.assert_close(encoded.words[row][encoded.mask[row]], torch.stack(words))
        torch.testing.assert_close(encoded.report[row], report)


def test_the_closing_token_counts_for_the_report_only() -> None:
    tokenizer = word_pieces()
    encoder = WordEncoder(
        spec=DataSpec(tokenizer=tokenizer, tokenizer_max_len=48), last_n_layers=2, **LAYERS
    )
    batch = encode(tokenizer, ["pleural effusion."], length=12)
    encoded = encoder.eval()(**batch)
    assert encoded.mask[0].tolist() == [True] * 4 + [False] * 8
    torch.testing.assert_close(encoded.report[0], encoded.words[0, :5].mean(dim=0))
    assert encoded.words[0, 4].abs().sum() > 0
    assert encoded.words[0, 5:].abs().sum() == 0


def test_padding_does_not_change_words() -> None:
    tokenizer = byte_pairs()
    encoder = WordEncoder(
        spec=DataSpec(tokenizer=tokenizer, tokenizer_max_len=64), last_n_layers=3, **LAYERS
    ).eval()
    short, long = (encoder(**encode(tokenizer, [REPORT], length=n)) for n in (40, 64))
    torch.testing.assert_close(long.report, short.report)
    torch.testing.assert_close(long.words[:, :40], short.words)
    assert long.mask.sum() == short.mask.sum()


def test_layers_are_summed() -> None:
    spec = tiny_spec()
    batch = encode(spec.tokenizer, ["small left effusion"], length=8)
    sums = []
    torch.manual_seed(0)
    encoder = WordEncoder(spec=spec, last_n_layers=1, **LAYERS).eval()
    for number in (1, 2, 3):
        encoder.last_n_layers = number
        sums.append(encoder(**batch).words)
    states = encoder.text.network(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
    ).hidden_states
    torch.testing.assert_close((sums[2] - sums[1])[0, :5], states[-3][0, :5])


def test_a_frozen_encoder_stays_as_it_is() -> None:
    encoder = WordEncoder(spec=tiny_spec(), last_n_layers=1, freeze=True, **TINY_BERT).train()
    assert not encoder.text.network.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_tokenizer_without_word_boundaries_is_refused() -> None:
    spec = DataSpec(tokenizer=sentence_pieces(split=False), tokenizer_max_len=16)
    with pytest.raises(ConfigError, match=r"dataset\.seq\.tokenizer: .*one word"):
        WordEncoder(spec=spec, last_n_layers=1, **TINY_BERT)


@pytest.mark.parametrize("number", [0, 5])
def test_layers_that_the_encoder_does_not_have(number: int) -> None:
    with pytest.raises(ConfigError, match=r"last_n_layers.*has 3 layers\. Allowed: 1 to 3"):
        WordEncoder(spec=tiny_spec(), last_n_layers=number, **LAYERS)


def test_data_without_reports() -> None:
    spec = dataclasses.replace(tiny_spec(), tokenizer=None)
    with pytest.raises(ConfigError, match="needs reports"):
        WordEncoder(spec=spec, **TINY_BERT)
