"""From reports to batches of ids: cleaning, tokenizing, padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast

from vilmedic.datasets.aligned import Batch, Sample
from vilmedic.datasets.report_cleaning import clean
from vilmedic.datasets.words import NO_WORD, word_numbers, word_texts

PAD_MULTIPLE = 8  # lengths that matrix units work on without waste


class ReportTokens:
    """What a data set does to a report between its file and the model.

    Args:
        tokenizer: turns text into ids.
        max_len: most ids of a report, special tokens included; the rest is cut off.
        processing: name of the cleaning; None for none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, max_len: int, processing: str | None
    ) -> None:
        self.tokenizer, self.max_len, self.processing = tokenizer, max_len, processing

    def encode(self, reports: Sequence[str]) -> Batch:
        """Clean and tokenize reports.

        Returns:
            `input_ids`, `attention_mask` and `word_ids`, int64 [B, T]: the last one numbers the
            words of a report from 0, special tokens included, and is -1 for padding. T is the
            longest report, rounded up to a multiple of 8.
        """
        return self.pad([self.tokens(clean(self.processing, report)) for report in reports])

    def words(self, report: str) -> list[str]:
        """The words of a report as the tokenizer splits it, in the numbering of `word_ids`."""
        text = clean(self.processing, report)
        encoded = self.tokenizer(text, truncation=True, max_length=self.max_len)
        encoding = encoded.encodings[0]
        numbers = word_numbers(encoding.word_ids)
        return word_texts(numbers, encoding.offsets, encoding.tokens, text)

    def tokens(self, text: str) -> Sample:
        """The `ids` of a cleaned report, the word of each (`words`), and if it was `truncated`."""
        encoded = self.tokenizer(text, truncation=True, max_length=self.max_len)
        encoding = encoded.encodings[0]
        return {
            "ids": encoded["input_ids"],
            "words": word_numbers(encoding.word_ids),
            "truncated": bool(encoding.overflowing),
        }

    def pad(self, samples: Sequence[Sample]) -> Batch:
        """A batch of what `tokens` gave; see `encode`."""
        longest = max(len(sample["ids"]) for sample in samples)
        length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.max_len)
        ids = torch.full((len(samples), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        words = torch.full_like(ids, NO_WORD)
        for row, sample in enumerate(samples):
            used = slice(len(sample["ids"]))
            ids[row, used] = torch.tensor(sample["ids"])
            mask[row, used] = 1
            words[row, used] = torch.tensor(sample["words"])
        return {"input_ids": ids, "attention_mask": mask, "word_ids": words}
