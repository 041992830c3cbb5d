"""What a model must know of the data it is trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    def to_plain(self) -> dict[str, Any]:
        """The properties as plain values, which a checkpoint can hold; see `from_plain`."""
        return {
            "tokenizer": None if self.tokenizer is None else _plain_tokenizer(self.tokenizer),
            "tokenizer_max_len": self.tokenizer_max_len,
            "labels": list(self.labels),
            "multi_label": self.multi_label,
            "filler": self.filler,
            "normalization": None if self.normalization is None else list(self.normalization),
        }

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> DataSpec:
        """The properties that `to_plain` gave.

        Raises:
            ValueError, KeyError, TypeError: they are damaged.
        """
        normalization = saved["normalization"]
        tokenizer = None if saved["tokenizer"] is None else _tokenizer(saved["tokenizer"])
        if tokenizer is not None:
            if not _is_count(saved["tokenizer_max_len"]):
                raise ValueError(f"tokenizer_max_len is {saved['tokenizer_max_len']!r}")
            if not (saved["filler"] is None or saved["filler"] in tokenizer.get_vocab().values()):
                raise ValueError(f"filler is {saved['filler']!r}, which is no word")
        if not all(isinstance(label, str) for label in saved["labels"]):
            raise ValueError("a label is no text")
        return cls(
            tokenizer=tokenizer,
            tokenizer_max_len=saved["tokenizer_max_len"],
            labels=tuple(saved["labels"]),
            multi_label=bool(saved["multi_label"]),
            filler=saved["filler"],
            normalization=None if normalization is None else (normalization[0], normalization[1]),
        )

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


SPECIAL = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The file `tokenizer.json` of a tokenizer, and which of its words are special."""
    special = {f"{name}_token": getattr(tokenizer, f"{name}_token", None) for name in SPECIAL}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # How reports are cut and padded is said with each call, and the last one is remembered there.
    content |= {"truncation": None, "padding": None}
    return {
        "json": json.dumps(content, ensure_ascii=False),
        "special": {name: str(word) for name, word in special.items() if word is not None},
    }


def _tokenizer(saved: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_str(saved["json"])
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(f"its tokenizer is damaged: {error}") from None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **saved["special"])
    if tokenizer.pad_token_id is None:
        raise ValueError("its tokenizer has no padding token")
    return tokenizer


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
