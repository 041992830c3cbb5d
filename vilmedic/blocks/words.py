"""Text encoders that keep the words of a report apart."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from vilmedic.blocks.pretrained import Filled
from vilmedic.blocks.text import TextEncoder, mask_for
from vilmedic.config.types import Between, ConfigOf, Runtime
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.text import has_word_boundaries, special_tokens_around
from vilmedic.errors import ConfigError


class Words(NamedTuple):
    """Reports as words.

    Args:
        report: one vector a report, [B, D].
        words: one vector a word, [B, T, D], zero behind the last one; T is the number of tokens,
            which no report has more words than.
        mask: which of them stand for the report, [B, T]: the opening special token and all words,
            but not the closing special token.
    """

    report: Tensor
    words: Tensor
    mask: Tensor


class WordEncoder(nn.Module):
    """Reports to one vector a word and one a report, as GLoRIA has them (Huang et al. 2021).

    The states of the last layers are added up; the pieces of a word are added up to the word, in
    which the opening and the closing special token are words too; the report is the mean over its
    words.

    Args:
        spec: the tokenizer and the length of the longest report.
        proto: the local folder or the hub name of a published model; null starts a BERT at random
            with the vocabulary of the tokenizer.
        last_n_layers: layers whose states are added up, counted from the last.
        freeze: keep the encoder as it is.
        pretrained: the directory or a checkpoint of another run, whose text encoder is taken to
            start from; both need the same vocabulary.
        filled: given when a checkpoint fills the weights afterwards, so that none are loaded here.
        settings: fields of the transformers configuration class of the model (BertConfig for null).

    Attributes:
        hidden_size: width of the output.
        opening: special tokens in front of a report.
        closing: special tokens behind it.
    """

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec],
        proto: str | None = None,
        last_n_layers: Annotated[int, Between(1, 1024)] = 4,
        freeze: bool = False,
        pretrained: str | None = None,
        filled: Runtime[Filled | None] = None,
        **settings: Annotated[Any, ConfigOf(default="bert", key="proto")],
    ) -> None:
        super().__init__()
        self.text = TextEncoder(
            spec=spec,
            proto=proto,
            pooling="mean",
            freeze=freeze,
            pretrained=pretrained,
            filled=filled,
            **settings,
        )
        layers = self.text.network.config.num_hidden_layers
        if not 1 <= last_n_layers <= layers:
            raise ConfigError(
                f"model.encoder.last_n_layers: given {last_n_layers}, but "
                f"{proto or 'the random BERT'} has {layers} layers. Allowed: 1 to {layers}."
            )
        assert spec.tokenizer is not None
        if not has_word_boundaries(spec.tokenizer):
            raise ConfigError(
                "dataset.seq.tokenizer: this tokenizer takes a sentence as one word, but the model "
                "compares words with regions of the image. Use a tokenizer that splits reports "
                "into words first, as those of BERT, RoBERTa and T5 do, or null to build a "
                "vocabulary of words."
            )
        self.opening, self.closing = special_tokens_around(spec.tokenizer)
        self.last_n_layers = last_n_layers
        self.hidden_size: int = self.text.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor, word_ids: Tensor) -> Words:
        """Encode reports; the amount of padding does not change the result.

        Args:
            input_ids: ids of the tokens, [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, T].
            word_ids: the word of each token, counted from 0, special tokens included; -1 for
                padding, [B, T].
        """
        network = self.text.network
        output = network(
            input_ids=input_ids,
            attention_mask=mask_for(network, attention_mask),
            output_hidden_states=True,
        )
        states = torch.stack(output.hidden_states[-self.last_n_layers :]).sum(dim=0)
        padding = (word_ids < 0).unsqueeze(-1)
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        states = states.masked_fill(padding, 0.0)
        places = word_ids.clamp(min=0).unsqueeze(-1).expand_as(states)
        words = torch.zeros_like(states).scatter_add(1, places, states)
        count = word_ids.amax(dim=1, keepdim=True) + 1
        mask = torch.arange(words.shape[1], device=words.device) < count - self.closing
        return Words(words.sum(dim=1) / count, words, mask)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"last_n_layers={self.last_n_layers}"
