"""Reports, one a line."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vilmedic.config.types import AtLeast, Between, Runtime, UsedWith
from vilmedic.datasets.aligned import Batch, Part, Sample
from vilmedic.datasets.lines import Lines, listed, read_lines
from vilmedic.datasets.report_cleaning import CLEANERS
from vilmedic.datasets.sample import stable_seed
from vilmedic.datasets.scripts import words
from vilmedic.datasets.sentences import MIN_WORDS, split_sentences
from vilmedic.datasets.vocabulary import run_vocabulary
from vilmedic.datasets.word_list import read_word_list, word_list
from vilmedic.datasets.words import NO_WORD, word_numbers, word_texts
from vilmedic.errors import DataError, nearest

PAD_MULTIPLE = 8  # lengths that matrix units work on without waste


class TextDataset(Part):
    """Reports read from `<root>/<split>.<file>`, cleaned and turned into ids.

    A batch is as long as its longest report, rounded up to a multiple of 8.

    Args:
        root: folder that holds the line files.
        file: name of the line files after the split.
        tokenizer: hub name or local folder of a transformers tokenizer; null builds a vocabulary of
            words from the training split and keeps it in the run directory. A word list `vocab.src`
            of the original vilmedic is read from the run directory, or where this says.
        tokenizer_max_len: most ids of a report, special tokens included; the rest is cut off.
        processing: way of cleaning the reports, published ones but for multilingual_clean_report,
            which keeps letters of any language; null leaves them as they are.
        sample_sentence: in training, draw sentences of the report anew at each step.
        max_sentences: with sample_sentence, draw one to this many, in order; 1 is the paper's way.
        vocab_min_frequency: occurrences that a word needs to get into a vocabulary that is built.
        on_error: whether reports with nothing left after cleaning end the run or are left out and
            listed; more than one in a hundred end it in any case.
    """

    def __init__(
        self,
        *,
        split: Runtime[str],
        training: Runtime[bool],
        seed: Runtime[int],
        run_dir: Runtime[Path],
        root: str,
        file: str = "report.tok",
        tokenizer: str | None = None,
        tokenizer_max_len: Annotated[int, Between(3, 65536)] = 128,
        processing: Literal[
            "r2gen_clean_report",
            "ifcc_clean_report",
            "gloria_clean_report_chexpert",
            "multilingual_clean_report",
        ]
        | None = None,
        sample_sentence: bool = False,
        max_sentences: Annotated[int, UsedWith("sample_sentence"), AtLeast(1)] = 1,
        vocab_min_frequency: Annotated[int, UsedWith("tokenizer", (None,)), AtLeast(1)] = 1,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if processing is not None and processing not in CLEANERS:
            raise ValueError(
                f"There is no processing named '{processing}'. Allowed: {', '.join(CLEANERS)}."
                f"{nearest(processing, CLEANERS)}"
            )
        self.max_sentences = max_sentences
        self.seed, self.sample_sentence = seed, sample_sentence and training
        self.tokenizer_max_len, self.processing = tokenizer_max_len, processing
        texts = read_lines(root, split, file)
        self.cleaned = texts
        empty: dict[int, str] = {}
        if processing is not None:
            self.cleaned = Lines([self.clean(text) for text in texts], texts.path)
            empty = {
                line: f"{texts.where(line)}: '{texts[line][:40]}'"
                for line, text in enumerate(self.cleaned)
                if not text
            }
        if empty and on_error == "raise":
            raise DataError(
                f"{listed(list(empty.values()), 'report')} with nothing left after "
                f"processing={processing}. Mend the lines, or set on_error=skip for the reports "
                "to leave a few samples out."
            )
        self.tokenizer = self._make_tokenizer(
            tokenizer, run_dir, split, training, vocab_min_frequency
        )
        # Runs with a word list learned padding as a word among others.
        listed_words = word_list(tokenizer, Path(run_dir)) is not None
        self.filler = self.tokenizer.pad_token_id if listed_words else None
        super().__init__(texts, empty)

    def clean(self, report: str) -> str:
        """Apply `processing` to a report."""
        return CLEANERS[self.processing](report).strip() if self.processing else report

    def encode(self, reports: Sequence[str]) -> Batch:
        """Clean and tokenize any reports, such as prompts.

        Returns:
            `input_ids`, `attention_mask` and `word_ids`, int64 [B, T]: the last one numbers the
            words of a report from 0, special tokens included, and is -1 for padding.
        """
        return self._pad([self._tokens(self.clean(report)) for report in reports])

    def encode_text(self, reports: Sequence[str]) -> Batch:
        """The same as `encode`, under the name that combined data sets have for it."""
        return self.encode(reports)

    def words(self, report: str) -> list[str]:
        """The words of any report as the tokenizer splits it, in the numbering of `word_ids`."""
        text = self.clean(report)
        encoded = self.tokenizer(text, truncation=True, max_length=self.tokenizer_max_len)
        encoding = encoded.encodings[0]
        numbers = word_numbers(encoding.word_ids)
        return word_texts(numbers, encoding.offsets, encoding.tokens, text)

    def read(self, line: int, epoch: int) -> Sample:
        """The tokens of a line's report, or of one sentence of it, and whether they were cut."""
        return self._tokens(
            self._sentence(line, epoch) if self.sample_sentence else self.cleaned[line]
        )

    def stack(self, samples: Sequence[Sample]) -> Batch:
        """Batch the tokens: `input_ids`, `attention_mask` and `word_ids`, int64 [B, T]."""
        return self._pad(samples)

    def show(self, line: int) -> dict[str, Any]:
        """The report as its file has it."""
        return {"report": self.texts[line]}

    def properties(self) -> dict[str, Any]:
        """The tokenizer and its longest output."""
        return {
            "tokenizer": self.tokenizer,
            "tokenizer_max_len": self.tokenizer_max_len,
            "filler": self.filler,
        }

    def _sentence(self, line: int, epoch: int) -> str:
        # Cleaning may remove what ends a sentence, so sentences are found before it.
        sentences = [self.clean(sentence) for sentence in split_sentences(self.texts[line])]
        usable = [text for text in sentences if len(words(text)) >= MIN_WORDS]
        usable = usable or [self.cleaned[line]]
        draw = random.Random(stable_seed("sentence", self.seed, epoch, line))
        count = draw.randint(1, min(self.max_sentences, len(usable)))
        return " ".join(usable[i] for i in sorted(draw.sample(range(len(usable)), count)))

    def _tokens(self, text: str) -> Sample:
        """`ids`, the word of each (`words`), and whether the report was cut (`truncated`)."""
        encoded = self.tokenizer(text, truncation=True, max_length=self.tokenizer_max_len)
        encoding = encoded.encodings[0]
        return {
            "ids": encoded["input_ids"],
            "words": word_numbers(encoding.word_ids),
            "truncated": bool(encoding.overflowing),
        }

    def _pad(self, samples: Sequence[Sample]) -> Batch:
        longest = max(len(sample["ids"]) for sample in samples)
        length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.tokenizer_max_len)
        ids = torch.full((len(samples), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        words = torch.full_like(ids, NO_WORD)
        for row, sample in enumerate(samples):
            used = slice(len(sample["ids"]))
            ids[row, used] = torch.tensor(sample["ids"])
            mask[row, used] = 1
            words[row, used] = torch.tensor(sample["words"])
        return {"input_ids": ids, "attention_mask": mask, "word_ids": words}

    def _make_tokenizer(
        self, name: str | None, run_dir: Path, split: str, training: bool, min_frequency: int
    ) -> PreTrainedTokenizerFast:
        path = word_list(name, Path(run_dir))
        if path is not None:
            return read_word_list(path)
        if name is not None:
            return load_tokenizer(name)
        from_reports = training and split == "train"
        return run_vocabulary(
            Path(run_dir),
            (text for text in self.cleaned if text) if from_reports else None,
            processing=self.processing,
            min_frequency=min_frequency,
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A ready tokenizer, from a local folder or from the hub.

    Raises:
        ValueError: there is none of that name, or it lacks what batches need.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub client raises errors of many libraries
        kind = "the folder holds no tokenizer" if Path(name).is_dir() else "there is no such folder"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"No tokenizer '{name}': {kind}, and the hub gave none ({reason}). Give the path of a "
            "folder with tokenizer.json, a hub name while the network is up, or null to build a "
            "vocabulary from the training reports."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"The tokenizer '{name}' has no fast version (tokenizer.json).")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer '{name}' has no padding token, which batches need.")
    return tokenizer
