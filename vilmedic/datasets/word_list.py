"""Word lists of the original vilmedic: `vocab.src`, one word a line, its number the id."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from vilmedic.datasets.vocabulary import FOLDER, with_special_tokens
from vilmedic.errors import DataError

NAME = "vocab.src"
SPECIAL = ("[CLS]", "[PAD]", "[SEP]", "[UNK]")


def word_list(name: str | None, run_dir: Path) -> Path | None:
    """The word list that a run reads: the file that is named, or that of the run directory.

    Args:
        name: the value of `tokenizer`.
        run_dir: the run directory; one that has a vocabulary of this project does not need a list.
    """
    if name is not None:
        return Path(name) if Path(name).is_file() else None
    path = run_dir / NAME
    return path if path.is_file() and not (run_dir / FOLDER).is_dir() else None


def read_word_list(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at white space and adds no special tokens, as those runs did.

    Raises:
        DataError: the file is not such a list.
    """
    try:
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a word list that can be read: {error}.") from None
    ids = {word: number for number, word in enumerate(words)}
    missing = [token for token in SPECIAL if token not in ids]
    if missing or len(ids) < len(words):
        double = next((f"line {n + 1}: '{w}'" for n, w in enumerate(words) if ids[w] != n), "")
        what = f"has no {', '.join(missing)}" if missing else f"repeats a word ({double})"
        raise DataError(
            f"{path}: not a word list of the original vilmedic, as it {what}. Expected: one word "
            f"a line, each once, {', '.join(SPECIAL)} among them."
        )
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_special_tokens(tokenizer)
