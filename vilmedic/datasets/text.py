"""Reports, one a line."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from vilmedic.config.types import AtLeast, Between, Runtime, UsedWith
from vilmedic.datasets.aligned import Batch, Part, Sample
from vilmedic.datasets.lines import Lines, listed, read_lines
from vilmedic.datasets.report_cleaning import CLEANERS, clean
from vilmedic.datasets.report_tokens import ReportTokens
from vilmedic.datasets.sample import stable_seed
from vilmedic.datasets.scripts import words
from vilmedic.datasets.sentences import MIN_WORDS, split_sentences
from vilmedic.datasets.vocabulary import run_vocabulary
from vilmedic.datasets.word_list import read_word_list, word_list
from vilmedic.errors import CheckpointError, ConfigError, DataError, nearest
from vilmedic.manifest import TEXT_ENCODER, TOKENIZER, exported_part

logger = logging.getLogger(__name__)

OWN_CODE = "trust_remote_code"  # what transformers names when it refuses Python of a folder
USUAL_TOKENS = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}


class TextDataset(Part):
    """Reports read from `<root>/<split>.<file>`, cleaned and turned into ids.

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
        self.cleaned: Sequence[str] = (
            texts if processing is None else CleanedLines(texts, self.clean)
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
        self.reports = ReportTokens(self.tokenizer, tokenizer_max_len, processing)
        # Runs with a word list learned padding as a word among others.
        listed_words = word_list(tokenizer, Path(run_dir)) is not None
        self.filler = self.tokenizer.pad_token_id if listed_words else None
        super().__init__(texts, empty)

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
        """The tokens of a line's report, or of one sentence of it, and whether they were cut."""
        return self.reports.tokens(
            self._sentence(line, epoch) if self.sample_sentence else self.cleaned[line]
        )

    def stack(self, samples: Sequence[Sample]) -> Batch:
        """Batch the tokens: `input_ids`, `attention_mask` and `word_ids`, int64 [B, T]."""
        return self.reports.pad(samples)

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

    def _usable(self, texts: Lines, empty: dict[int, str], on_error: str) -> Iterator[str]:
        """The cleaned reports with something left, each cleaned once; the others go to `empty`.

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
                f"processing={self.processing}. Mend the lines, or set on_error=skip for the "
                "reports to leave a few samples out."
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
            for _ in reports:  # finds those with nothing left
                pass
        if path is not None:
            return read_word_list(path)
        if name is not None:
            return load_tokenizer(name)
        return run_vocabulary(
            Path(run_dir), None, processing=self.processing, min_frequency=min_frequency
        )


class CleanedLines(Sequence[str]):
    """Lines as they are after cleaning, which is done anew for each that is asked for.

    To hold them beside the lines would double the memory of a large data set.

    Args:
        texts: the lines.
        clean: what is done to each.
    """

    def __init__(self, texts: Lines, clean: Callable[[str], str]) -> None:
        self.texts, self.clean = texts, clean

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, line: int) -> str:  # type: ignore[override]
        return self.clean(self.texts[line])


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A ready tokenizer, from a local folder, an exported one too, or from the hub.

    Python that comes with a tokenizer is never executed: its tokenizer.json is read without it.

    Raises:
        ValueError: there is none of that name, or it lacks what batches need.
    """
    try:
        name = exported_part(name, TEXT_ENCODER, TOKENIZER)
        with quiet():
            tokenizer = _read_tokenizer(name)
    except CheckpointError as error:  # of an export that is damaged or has none
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
    """The tokenizer of a name; of one that brings Python of its own, what tokenizer.json says."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        if OWN_CODE not in str(error):
            raise
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        usable = "Without it a tokenizer needs tokenizer.json, which is not there."
        raise ConfigError(own_code("dataset.seq.tokenizer", name, usable)) from error
    # Roles that its class would have given to tokens by their usual names.
    special = {
        str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    for role, names in USUAL_TOKENS.items():
        found = [token for token in names if token in special]
        if found and getattr(tokenizer, role) is None:
            setattr(tokenizer, role, found[0])
    logger.warning(
        "%s brings Python code of its own, which is not executed; its tokenizer.json is used, with "
        "%s",
        name,
        ", ".join(f"{role} {token}" for role, token in tokenizer.special_tokens_map.items()),
    )
    return tokenizer


def own_code(key: str, name: str, usable: str) -> str:
    """What to say of a model or tokenizer that needs Python of its own.

    Args:
        key: the configuration key that holds the name.
        name: a local folder or a hub name.
        usable: what of it can be used all the same.
    """
    return (
        f"{key}: {name} needs Python code that comes with it, which could do anything and is never "
        f"executed. {usable}"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing what its callers say themselves, if it matters."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
