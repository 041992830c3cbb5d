"""Word vocabularies, for runs without a pretrained tokenizer.

They are built from the training reports, or read from a word list of the original vilmedic
(`vocab.src`, one word per line, whose number is the id).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vilmedic.datasets.lines import UNSPACED
from vilmedic.errors import DataError
from vilmedic.log import Progress

FOLDER = "tokenizer"  # in the run directory
WORD_LIST = "vocab.src"
_SETTINGS = "vocabulary.json"
_REMEDY = "If the training reports are those of before, delete the folder: it is rebuilt from them."
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def train_vocabulary(reports: Iterable[str], *, min_frequency: int) -> PreTrainedTokenizerFast:
    """A tokenizer of lower-case words and punctuation, most frequent first.

    Scripts without spaces between words are split as in `vilmedic.datasets.lines`.

    Args:
        reports: cleaned reports of the training split.
        min_frequency: a word needs at least that many occurrences to get an id of its own.

    Returns:
        A tokenizer that writes `[CLS] words [SEP]`, with `[PAD]` = 0 and `[UNK]` = 1.
    """
    tokenizer = Tokenizer(WordLevel({}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(UNSPACED), "isolated")]
    )
    counts = _count_words(reports, tokenizer)
    frequent = [word for word in counts if counts[word] >= min_frequency]
    frequent.sort(key=lambda word: (-counts[word], word))
    numbers = {word: number for number, word in enumerate([*_SPECIAL, *frequent])}
    tokenizer.model = WordLevel(numbers, unk_token="[UNK]")
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return with_special_tokens(tokenizer)


def _count_words(reports: Iterable[str], tokenizer: Tokenizer) -> Counter[str]:
    """How often each word occurs, as a tokenizer normalises and splits.

    No word contains a space, so each distinct piece of text between spaces is split once.
    """
    chunks: Counter[str] = Counter()
    for report in reports:
        chunks.update(report.split(" "))
    words: Counter[str] = Counter()
    for chunk, times in chunks.items():
        normal = tokenizer.normalizer.normalize_str(chunk)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            words[word] += times
    return words


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a word tokenizer with its special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def run_vocabulary(
    run_dir: Path,
    reports: Iterable[str] | None,
    *,
    processing: str | list[str] | None,
    min_frequency: int,
) -> PreTrainedTokenizerFast:
    """Return the vocabulary of a run: built and saved at its first training, then read.

    Args:
        run_dir: the run directory; the vocabulary is its folder `tokenizer`.
        reports: the cleaned training reports, or None when the run is not being trained.
        processing: the cleaning as `chain` gives it, recorded beside the vocabulary.
        min_frequency: see `train_vocabulary`; recorded likewise.

    Raises:
        DataError: there is neither a vocabulary nor training reports to build one, or it was built
            from other reports or settings than those of this training.
    """
    folder = run_dir / FOLDER
    settings: dict[str, str | int | list[str] | None] = {}
    tokenizer = None
    if reports is not None:
        digest = hashlib.sha256()
        passed = _digested(reports, digest)
        with Progress("Reading the reports for their vocabulary"):
            if folder.is_dir():
                for _ in passed:
                    pass
            else:
                tokenizer = train_vocabulary(passed, min_frequency=min_frequency)
        settings = {
            "processing": processing,
            "min_frequency": min_frequency,
            "reports": digest.hexdigest(),
        }
    if folder.is_dir():
        _check_settings(folder, settings)
        return _read(folder)
    if tokenizer is None:
        raise DataError(
            f"There is no vocabulary in {folder}: with tokenizer=null it is built from the "
            "training split when the run is trained. Train the run first, or set tokenizer to a "
            "hub name or a folder."
        )
    draft = run_dir / f".{FOLDER}.{os.getpid()}"
    tokenizer.save_pretrained(draft)
    (draft / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    try:
        os.replace(draft, folder)  # an interrupted start leaves no half-written vocabulary
    except OSError:
        shutil.rmtree(draft)
        if not folder.is_dir():
            raise
    return _read(folder)


def _read(folder: Path) -> PreTrainedTokenizerFast:
    """The vocabulary in a folder.

    Raises:
        DataError: a file of it is damaged.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{_damaged(folder)}: is damaged, so the vocabulary of the run cannot be read "
            f"({reason}). {_REMEDY}"
        ) from None


def _damaged(folder: Path) -> Path:
    """The file of a vocabulary that cannot be read."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return path
    return folder / "tokenizer.json"


def _digested(reports: Iterable[str], digest: hashlib._Hash) -> Iterator[str]:
    """Yield reports unchanged, adding each to a digest of all of them."""
    for number, report in enumerate(reports):
        digest.update(f"\n{report}".encode() if number else report.encode())
        yield report


def _check_settings(folder: Path, settings: dict[str, str | int | list[str] | None]) -> None:
    path = folder / _SETTINGS
    if not settings or not path.is_file():
        return
    try:
        recorded = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: is damaged ({type(error).__name__}: {error}). {_REMEDY}"
        ) from None
    changed = [name for name, value in settings.items() if recorded.get(name) != value]
    if changed:
        raise DataError(
            f"The vocabulary in {folder} was built from other {', '.join(changed)} than this "
            "training has. Give the run another name, or delete that folder and its checkpoints."
        )


def word_list(name: str | None, run_dir: Path) -> Path | None:
    """Return the word list of a run: the given file, or that of the run directory.

    Args:
        name: the value of `tokenizer`.
        run_dir: the run directory; one that has a vocabulary of this project does not need a list.
    """
    if name is not None:
        return Path(name) if Path(name).is_file() else None
    path = run_dir / WORD_LIST
    return path if path.is_file() and not (run_dir / FOLDER).is_dir() else None


def read_word_list(path: Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer that splits at white space and adds no special tokens, as in those runs.

    Raises:
        DataError: the file is not such a list.
    """
    try:
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a word list that can be read: {error}.") from None
    ids = {word: number for number, word in enumerate(words)}
    missing = [token for token in sorted(_SPECIAL) if token not in ids]
    if missing or len(ids) < len(words):
        double = next((f"line {n + 1}: '{w}'" for n, w in enumerate(words) if ids[w] != n), "")
        what = f"has no {', '.join(missing)}" if missing else f"repeats a word ({double})"
        raise DataError(
            f"{path}: not a word list of the original vilmedic, as it {what}. Expected: one word "
            f"a line, each once, {', '.join(sorted(_SPECIAL))} among them."
        )
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_special_tokens(tokenizer)
