"""Report data set: tokenisation of reports, one per line, into batches of ids."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from vilmedic.config.transformers_fields import body_of
from vilmedic.config.types import AtLeast, Between, Runtime, UsedWith
from vilmedic.datasets.aligned import (
    REPORT_FEATURES,
    REPORT_HASH,
    TOKEN_HASH,
    AlignedPart,
    Batch,
    Sample,
    plain_tokenizer,
    stable_seed,
)
from vilmedic.datasets.lines import MIN_WORDS, Lines, listed, read_lines, split_sentences, words
from vilmedic.datasets.report_text import chain, chain_name, clean
from vilmedic.datasets.vocabulary import read_word_list, run_vocabulary, word_list
from vilmedic.errors import ArgumentError, CheckpointError, ConfigError, DataError
from vilmedic.log import progress

logger = logging.getLogger(__name__)

OWN_CODE = "trust_remote_code"  # what transformers names when it refuses Python of a folder
USUAL_TOKENS = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
PAD_MULTIPLE = 8  # lengths that matrix units work on without waste
NO_WORD = -1  # of padding
TOGETHER = 1024  # reports that are read together

Cleaning = Literal[
    "r2gen_clean_report",
    "ifcc_clean_report",
    "gloria_clean_report_chexpert",
    "multilingual_clean_report",
    "remove_prior_references",
    "remove_deidentification",
]


class TextDataset(AlignedPart):
    """Reports read from `<root>/<split>.<file>`, cleaned and turned into ids.

    Args:
        root: folder that holds the line files.
        file: name of the line files after the split.
        tokenizer: hub name or local folder of a transformers tokenizer; null builds a vocabulary of
            words from the training split and keeps it in the run directory. A word list `vocab.src`
            of the original vilmedic is read from the run directory, or where this says.
        tokenizer_max_len: most ids of a report, special tokens included; the rest is cut off.
        processing: how reports are cleaned, by one name or a list of several that are applied in
            order. Published cleanings are r2gen_, ifcc_ and gloria_; multilingual_clean_report
            keeps letters of any language; remove_prior_references drops references to earlier
            studies in English, and remove_deidentification marks such as ___, and both belong in
            front of the others; null leaves reports as they are.
        sample_sentence: in training, draw other sentences of the report at each step.
        max_sentences: with sample_sentence, draw one to this many, in order; 1 is the paper's way.
        shuffle_sentences: in training, put the sentences of the report into another order at each
            step.
        vocab_min_frequency: occurrences that a word needs to get into a vocabulary that is built.
        on_error: whether reports with nothing left after cleaning end the run or are left out and
            listed; more than one in a hundred end it in any case.

    Attributes:
        hashes: whether batches hold hashes of the reports; set before loading, for models that
            need them.
    """

    features: ClassVar[str] = REPORT_FEATURES
    fixed_by: ClassVar[str] = "sample_sentence and shuffle_sentences of the reports off"

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
        processing: Cleaning | list[Cleaning] | None = None,
        sample_sentence: bool = False,
        max_sentences: Annotated[int, UsedWith("sample_sentence"), AtLeast(1)] = 1,
        shuffle_sentences: bool = False,
        vocab_min_frequency: Annotated[int, UsedWith("tokenizer", (None,)), AtLeast(1)] = 1,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.hashes = False
        self._known: KnownReports | None = None  # in place of tokens
        self.split, self.max_sentences = split, max_sentences
        self.seed, self.sample_sentence = seed, sample_sentence and training
        self.shuffle_sentences = shuffle_sentences and training
        self.tokenizer_max_len, self.processing = tokenizer_max_len, chain(processing)
        texts = read_lines(root, split, file)
        self.cleaned: Sequence[str] = (
            texts if self.processing is None else CleanedLines(texts, self.clean)
        )
        empty: dict[int, str] = {}
        reports = self._usable(texts, empty, on_error)
        self.tokenizer = self._make_tokenizer(
            tokenizer,
            run_dir,
            reports,
            training and split == "train",
            vocab_min_frequency,
        )
        self.reports = ReportTokens(self.tokenizer, tokenizer_max_len, self.processing)
        # Runs with a word list learned padding as an ordinary word.
        listed_words = word_list(tokenizer, Path(run_dir)) is not None
        self.filler = self.tokenizer.pad_token_id if listed_words else None
        super().__init__(texts, empty)

    @property
    def random(self) -> bool:
        """Whether reports differ between epochs, so that their features cannot be cached."""
        return self.sample_sentence or self.shuffle_sentences

    def clean(self, report: str) -> str:
        """Apply `processing` to a report."""
        return clean(self.processing, report)

    def encode_text(self, reports: Sequence[str]) -> Batch:
        """The ids of any reports, such as prompts; see `ReportTokens.encode`."""
        return self.reports.encode(reports)

    def words(self, report: str) -> list[str]:
        """The words of any report; see `ReportTokens.words`."""
        return self.reports.words(report)

    def read(self, line: int, epoch: int) -> Sample:
        """Read the tokens of a line's report in an epoch, and whether they were truncated.

        With `rows` its precomputed features beside them, or these and hashes alone.
        """
        kept = {} if self.rows is None else {self.rows[0]: self.rows[1](line)}
        if self._known is not None:
            return kept | self._known.of(line)
        text = self._drawn(line, epoch) if self.random else self.cleaned[line]
        sample = self.reports.tokens(text) | kept
        if self.hashes:
            # The order of sentences does not change the identity of a report.
            reordered = self.shuffle_sentences and not self.sample_sentence
            same = self.cleaned[line] if reordered else text[: sample["end"]]
            sample["hash"] = text_hash(same)
        return sample

    def stack(self, samples: Sequence[Sample]) -> Batch:
        """Batch the tokens: `input_ids`, `attention_mask` and `word_ids`, int64 [B, T].

        With `hashes` also `report_hash`, int64 [B]: that of the text that the model reads, cleaned
        and cut to `tokenizer_max_len`. With `rows` also these, [B, F]; without tokens `token_hash`
        in their place, int64 [B].
        """
        if self._known is None:
            batch = self.reports.pad(samples)
        else:
            batch = {TOKEN_HASH: torch.tensor([sample["tokens"] for sample in samples])}
        if self.hashes:
            batch[REPORT_HASH] = torch.tensor([sample["hash"] for sample in samples])
        if self.rows is not None:
            name, _ = self.rows
            batch[name] = torch.stack([sample[name] for sample in samples])
        return batch

    def leave_out_tokens(self, lines: NDArray[np.int64]) -> None:
        """Give features and hashes instead of tokens; see `AlignedPart.leave_out_tokens`."""
        self._known = KnownReports(self.reports, self.cleaned, lines)

    @property
    def fixed(self) -> bool:
        """Whether a line gives the same in every epoch."""
        return not self.random

    def content(self, lines: NDArray[np.int64], folder: Path) -> list[Any]:
        """Return a digest of the cleaned reports, with the tokenizer settings."""
        digest = hashlib.sha256()
        for line in lines.tolist():
            digest.update(f"{self.cleaned[line]}\n".encode())
        return [digest.hexdigest(), plain_tokenizer(self.tokenizer), self.tokenizer_max_len]

    def show(self, line: int) -> dict[str, Any]:
        """Return the original report."""
        return {"report": self.texts[line]}

    def properties(self) -> dict[str, Any]:
        """Return the tokenizer and its longest output."""
        return {
            "tokenizer": self.tokenizer,
            "tokenizer_max_len": self.tokenizer_max_len,
            "filler": self.filler,
        }

    def _drawn(self, line: int, epoch: int) -> str:
        """Return the sentences of a report for an epoch, in its order.

        The draw depends on seed, epoch and line alone, as for images.
        """
        # Cleaning may remove sentence ends, so sentences are split before it.
        sentences = [self.clean(sentence) for sentence in split_sentences(self.texts[line])]
        if self.sample_sentence:
            usable = [text for text in sentences if len(words(text)) >= MIN_WORDS]
            usable = usable or [self.cleaned[line]]
            draw = random.Random(stable_seed("sentence", self.seed, epoch, line))
            count = draw.randint(1, min(self.max_sentences, len(usable)))
            sentences = [usable[i] for i in sorted(draw.sample(range(len(usable)), count))]
        else:
            sentences = [text for text in sentences if text] or [self.cleaned[line]]
        if self.shuffle_sentences:
            draw = random.Random(stable_seed("sentence order", self.seed, epoch, line))
            draw.shuffle(sentences)
        return " ".join(sentences)

    def _usable(self, texts: Lines, empty: dict[int, str], on_error: str) -> Iterator[str]:
        """Yield the non-empty cleaned reports, each cleaned once; the others go to `empty`.

        Raises:
            DataError: at the end, if there are such and `on_error` does not skip them.
        """
        for line, text in enumerate(self.cleaned):
            if text:
                yield text
            else:
                empty[line] = f"{texts.where(line)}: '{texts[line][:40]}'"
        if empty and on_error == "raise":
            raise DataError(
                f"{listed(list(empty.values()), 'report')} with nothing left after "
                f"processing={chain_name(self.processing or '')}. Fix the lines, or set "
                "on_error=skip for the reports to leave a few samples out."
            )

    def _make_tokenizer(
        self,
        name: str | None,
        run_dir: Path,
        reports: Iterator[str],
        from_reports: bool,
        min_frequency: int,
    ) -> PreTrainedTokenizerFast:
        path = word_list(name, Path(run_dir))
        if name is None and path is None and from_reports:
            return run_vocabulary(
                Path(run_dir), reports, processing=self.processing, min_frequency=min_frequency
            )
        if self.processing is not None:
            for _ in reports:  # finds the empty ones
                pass
        if path is not None:
            return read_word_list(path)
        if name is not None:
            try:
                return load_tokenizer(name)
            except ValueError as error:
                raise ArgumentError({"tokenizer": str(error)}) from error
        return run_vocabulary(
            Path(run_dir), None, processing=self.processing, min_frequency=min_frequency
        )


class CleanedLines(Sequence[str]):
    """Lines after cleaning, which is repeated for each access.

    Storing them beside the lines would double the memory of a large data set.

    Args:
        texts: the lines.
        clean: the cleaning function.
    """

    def __init__(self, texts: Lines, clean: Callable[[str], str]) -> None:
        self.texts, self.clean = texts, clean

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, line: int) -> str:  # type: ignore[override]
        return self.clean(self.texts[line])


class ReportTokens:
    """Report preprocessing of a data set, from file to model input.

    Args:
        tokenizer: turns text into ids.
        max_len: most ids of a report, special tokens included; the rest is cut off.
        processing: name of the cleaning, or of several in their order; None for none.

    Raises:
        ValueError: there is no such cleaning.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_len: int,
        processing: str | Sequence[str] | None,
    ) -> None:
        self.tokenizer, self.max_len, self.processing = tokenizer, max_len, chain(processing)

    def encode(self, reports: Sequence[str]) -> Batch:
        """Clean and tokenize reports.

        Returns:
            `input_ids`, `attention_mask` and `word_ids`, int64 [B, T]: the last one numbers the
            words of a report from 0, special tokens included, and is -1 for padding. T is the
            longest report, rounded up to a multiple of 8.
        """
        return self.pad([self.tokens(clean(self.processing, report)) for report in reports])

    def words(self, report: str) -> list[str]:
        """Return the words of a report as the tokenizer splits it, numbered as in `word_ids`."""
        text = clean(self.processing, report)
        encoded = self.tokenizer(text, truncation=True, max_length=self.max_len)
        encoding = encoded.encodings[0]
        numbers = word_numbers(encoding.word_ids)
        return word_texts(numbers, encoding.offsets, encoding.tokens, text)

    def tokens(self, text: str) -> Sample:
        """Return the `ids` of a cleaned report and the word of each (`words`).

        Also whether it was `truncated`, and the `end` of the part that was kept.
        """
        return self.tokens_of([text])[0]

    def tokens_of(self, texts: list[str]) -> list[Sample]:
        """Tokenize several cleaned reports, faster than one by one."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_len)
        return [
            {
                "ids": encoding.ids,
                "words": word_numbers(encoding.word_ids),
                "truncated": bool(encoding.overflowing),
                "end": max(end for _, end in encoding.offsets),
            }
            for encoding in encoded.encodings
        ]

    def pad(self, samples: Sequence[Sample]) -> Batch:
        """Collate results of `tokens`; see `encode`."""
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


class KnownReports:
    """Hashes of reports whose tokens the model does not read, 17 bytes per report.

    Args:
        reports: tokenizes them, once.
        cleaned: the cleaned report of each line.
        lines: numbers of the lines, in order.
    """

    def __init__(
        self, reports: ReportTokens, cleaned: Sequence[str], lines: NDArray[np.int64]
    ) -> None:
        self._lines = lines
        self._tokens, self._texts = np.empty(len(lines), np.int64), np.empty(len(lines), np.int64)
        self._cut = np.empty(len(lines), np.bool_)
        for start in progress(range(0, len(lines), TOGETHER), "Reading the reports", "batches"):
            texts = [cleaned[line] for line in lines[start : start + TOGETHER].tolist()]
            for place, sample in enumerate(reports.tokens_of(texts)):
                self._tokens[start + place] = _hash(np.array(sample["ids"], np.int64).tobytes())
                self._texts[start + place] = text_hash(texts[place][: sample["end"]])
                self._cut[start + place] = sample["truncated"]

    def of(self, line: int) -> Sample:
        """Hashes of a line's `tokens` and of its text (`hash`), and whether it was `truncated`."""
        place = np.searchsorted(self._lines, line)
        return {
            "tokens": int(self._tokens[place]),
            "hash": int(self._texts[place]),
            "truncated": bool(self._cut[place]),
        }


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process and on every machine."""
    return _hash(text.encode())


def _hash(content: bytes) -> int:
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local folder, an exported folder or the hub.

    Python code of a tokenizer is never executed: its tokenizer.json is read without it.

    Raises:
        ValueError: there is none of that name, or it has no fast version or no padding token.
    """
    from vilmedic.manifest import TEXT_ENCODER, TOKENIZER, exported_part

    try:
        name = exported_part(name, TEXT_ENCODER, TOKENIZER)
        with quiet():
            tokenizer = _read_tokenizer(name)
    except CheckpointError as error:  # the export is damaged or has none
        raise ValueError(str(error)) from error
    except ConfigError as error:
        raise ValueError(str(error)) from error
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


def _read_tokenizer(name: str) -> Any:
    """Load a tokenizer by name; one with its own Python code is read from tokenizer.json."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        if OWN_CODE not in str(error):
            raise
    try:
        reader = _class_of_body(name)
        tokenizer = reader.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        usable = "Without it a tokenizer needs tokenizer.json, which is not there."
        raise ArgumentError({"tokenizer": own_code(name, usable)}) from error
    # Roles that its class would assign to tokens by their usual names.
    special = {
        str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    for role, names in USUAL_TOKENS.items():
        found = [token for token in names if token in special]
        if found and getattr(tokenizer, role) is None:
            setattr(tokenizer, role, found[0])
    logger.warning(
        "%s brings Python code of its own, which is not executed; its %s is used, with %s",
        name,
        "tokenizer.json" if reader is PreTrainedTokenizerFast else "vocabulary of BERT",
        ", ".join(f"{role} {token}" for role, token in tokenizer.special_tokens_map.items()),
    )
    return tokenizer


def _class_of_body(name: str) -> Any:
    """Return the class for the tokenizer of a model with its own Python code.

    For BERT-based models it is the class of BERT, which can also read a word list.
    """
    try:
        stated, _ = PretrainedConfig.get_config_dict(name)
    except Exception:  # a tokenizer alone, or a damaged file, which loading the model reports
        return PreTrainedTokenizerFast
    return BertTokenizer if body_of(stated) == "bert" else PreTrainedTokenizerFast


def own_code(name: str, usable: str) -> str:
    """Return the message about a model or tokenizer that needs its own Python code.

    Args:
        name: a local folder or a hub name.
        usable: the part of it that can still be used.
    """
    return (
        f"{name} needs Python code that comes with it, which could do anything and is never "
        f"executed. {usable}"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence messages of transformers that callers give themselves if needed."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def word_numbers(boundaries: Sequence[int | None]) -> list[int]:
    """Number the words of a report; every special token counts as a word.

    Args:
        boundaries: the word of each token, from `Encoding.word_ids`; None for special tokens.

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
    """Return the words of a report as written.

    Args:
        numbers: the word of each token.
        offsets: start and end of each token in the text; equal for special tokens.
        tokens: the tokens, used for words without an extent.
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
    """Return whether a tokenizer splits text into words first."""
    return len({word for word in tokenizer("left right").word_ids() if word is not None}) > 1


def special_tokens_around(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Count the special tokens that a tokenizer adds before and after a report."""
    words = tokenizer("left").word_ids()
    inside = [place for place, word in enumerate(words) if word is not None]
    return inside[0], len(words) - 1 - inside[-1]
