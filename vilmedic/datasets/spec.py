"""What a model must know of the data it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vilmedic.errors import ConfigError

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
        normalization: mean and standard deviation of the colour channels that images are brought
            to after scaling to 0..1; None when the data set has no images.
    """

    tokenizer: PreTrainedTokenizerFast | None = None
    tokenizer_max_len: int | None = None
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    filler: int | None = None
    normalization: tuple[list[float], list[float]] | None = None

    @property
    def vocab_size(self) -> int | None:
        """The largest id that the tokenizer can produce plus one: ids may have gaps."""
        return None if self.tokenizer is None else max(self.tokenizer.get_vocab().values()) + 1

    def check_pixels(self, model: str) -> None:
        """Refuse normalised images, for a model that takes pixels in 0..1.

        Args:
            model: its name, for the message.

        Raises:
            ConfigError: the data set normalises its images.
        """
        if self.normalization is None:
            return
        mean, std = self.normalization
        if any(mean) or set(std) != {1}:
            raise ConfigError(
                f"mean and std of the images: given {mean} and {std}, but {model} takes pixels in "
                "0..1 and normalises them itself. Set mean=[0] and std=[1] where the data set says "
                "how images are read."
            )
