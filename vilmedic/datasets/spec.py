"""What a model must know of the data it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class DataSpec:
    """The properties of a data set that shape a model.

    Args:
        tokenizer: turns reports into ids; None when the data set has no text.
        tokenizer_max_len: largest number of ids of a report, special tokens included.
        labels: the class names in the order of the label columns; empty when there are none.
        multi_label: whether a sample may have several labels.
        filler: the word that reports are filled up with, for models that give every text position a
            token; None, the rule, leaves it to them to mark what lies behind a report's end.
    """

    tokenizer: PreTrainedTokenizerFast | None = None
    tokenizer_max_len: int | None = None
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    filler: int | None = None

    @property
    def vocab_size(self) -> int | None:
        """Number of ids that the tokenizer can produce, added tokens included."""
        return None if self.tokenizer is None else len(self.tokenizer)
