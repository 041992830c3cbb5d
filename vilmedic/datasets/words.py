"""Words of tokenized reports: which tokens make up one word, as the fast tokenizer says."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

NO_WORD = -1  # of padding


def word_numbers(boundaries: Sequence[int | None]) -> list[int]:
    """Number the words of a report; every special token around it is a word of its own.

    Args:
        boundaries: the word of each token as `Encoding.word_ids` has it; None for special tokens.

    Returns:
        For each token the number of its word, counted from 0: for `[CLS] pleu ##ral . [SEP]` this
        is 0, 1, 1, 2, 3.
    """
    numbers: list[int] = []
    number, previous = -1, None
    for word in boundaries:
        if word is None or word != previous:
            number += 1
        numbers.append(number)
        previous = word
    return numbers


def word_texts(
    numbers: Sequence[int], offsets: Sequence[tuple[int, int]], tokens: Sequence[str], text: str
) -> list[str]:
    """The words of a report as they stand in it.

    Args:
        numbers: the word of each token.
        offsets: where each token begins and ends in the text; special tokens take no place.
        tokens: the tokens, which stand for words that take no place.
        text: the report.
    """
    spans: dict[int, tuple[int, int]] = {}
    names: dict[int, str] = {}
    for number, (start, end), token in zip(numbers, offsets, tokens, strict=True):
        names[number] = names.get(number, "") + token
        if end > start:
            first, last = spans.get(number, (start, end))
            spans[number] = (min(first, start), max(last, end))
    return [
        text[slice(*spans[number])].strip() if number in spans else name
        for number, name in names.items()
    ]


def has_word_boundaries(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer tells words apart; one that works on whole sentences does not."""
    return len({word for word in tokenizer("left right").word_ids() if word is not None}) > 1


def special_tokens_around(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """How many special tokens a tokenizer puts in front of a report and behind it."""
    words = tokenizer("left").word_ids()
    inside = [place for place, word in enumerate(words) if word is not None]
    return inside[0], len(words) - 1 - inside[-1]
