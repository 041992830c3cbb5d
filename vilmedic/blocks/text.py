"""Text encoders: a published model of transformers, or a BERT with random weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel

from vilmedic.blocks.pretrained import Filled, first_line, load_config, load_model
from vilmedic.blocks.run_weights import check_vocabulary, fill, read_encoder
from vilmedic.config.types import ConfigOf, Runtime
from vilmedic.datasets.aligned import DataSpec
from vilmedic.errors import ConfigError, nearest

POOLINGS = ("pooler", "cls", "mean", "max")
RESERVED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet")


class TextEncoder(nn.Module):
    """Reports to one vector each.

    Args:
        spec: the tokenizer and the length of the longest report.
        proto: the local folder or the hub name of a published model; null starts a BERT at random
            with the vocabulary of the tokenizer.
        pooling: how the vectors of a report's tokens become one: pooler is the model's own (a
            dense layer and tanh on the first token), cls the first token, mean and max go over all
            tokens but the padding.
        freeze: keep the encoder as it is.
        pretrained: the directory or a checkpoint of another run, whose text encoder is taken to
            start from; both need the same vocabulary.
        filled: given when a checkpoint fills the weights afterwards, so that none are loaded here.
        settings: fields of the transformers configuration class of the model (BertConfig for null).

    Attributes:
        hidden_size: width of the output.
    """

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec],
        proto: str | None = None,
        pooling: Literal["pooler", "cls", "mean", "max"] = "pooler",
        freeze: bool = False,
        pretrained: str | None = None,
        filled: Runtime[Filled | None] = None,
        **settings: Annotated[Any, ConfigOf(default="bert", key="proto")],
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ConfigError(
                f"model.encoder.pooling: '{pooling}' is not allowed; choose {', '.join(POOLINGS)}."
                f"{nearest(pooling, POOLINGS)}"
            )
        if spec.tokenizer is None or spec.vocab_size is None:
            raise ConfigError(
                "model.encoder needs reports, but the data set has none: use one with a seq "
                "section, such as dataset.proto=ImSeq."
            )
        self.proto = proto
        self.pooling = pooling
        self.freeze = freeze
        if proto is None:
            self.network = _random_bert(spec, settings, pooler=pooling == "pooler")
        else:
            key = "model.encoder.proto"
            config = load_config(key, proto, settings, filled)
            config.attn_implementation = "sdpa"
            published = filled is None and pretrained is None
            self.network = load_model(
                key, proto, config, pooler=pooling == "pooler", weights=published
            )
            self._try(proto)
        if pretrained is not None and filled is None:
            file = read_encoder("model.encoder.pretrained", pretrained, "encoder", self.network)
            check_vocabulary(file, spec)
            fill(file, self.network)
        self._check(spec)
        self.hidden_size: int = self.network.config.hidden_size
        if freeze:
            self.network.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> TextEncoder:
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        super().train(mode)
        if self.freeze:
            self.network.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode reports; the amount of padding does not change the result.

        Args:
            input_ids: ids of the tokens, [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, T].

        Returns:
            One vector a report, [B, hidden_size].
        """
        output = self.network(
            input_ids=input_ids, attention_mask=mask_for(self.network, attention_mask)
        )
        if self.pooling == "pooler":
            return output.pooler_output
        states = output.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        padding = attention_mask.unsqueeze(-1) == 0
        if self.pooling == "max":
            return states.masked_fill(padding, float("-inf")).amax(dim=1)
        lengths = attention_mask.sum(dim=1, keepdim=True)
        return states.masked_fill(padding, 0.0).sum(dim=1) / lengths

    def _check(self, spec: DataSpec) -> None:
        """Refuse an encoder that cannot read what the tokenizer writes."""
        config: PretrainedConfig = self.network.config
        name = self.proto or "the random BERT"
        problems = []
        if self.pooling == "pooler" and not hasattr(self.network, "pooler"):
            problems.append(
                f"model.encoder.pooling: {name} ({config.model_type}) has no pooler. Allowed: cls, "
                "mean, max."
            )
        table: Any = self.network.get_input_embeddings()
        embeddings = table.num_embeddings
        if (spec.vocab_size or 0) > embeddings:
            problems.append(
                f"model.encoder.proto: {name} has {embeddings} embeddings, but the tokenizer gives "
                f"{spec.vocab_size} ids. Use the tokenizer of the encoder (dataset.seq.tokenizer)"
                + ("." if self.proto else " or a larger model.encoder.vocab_size.")
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions and config.model_type in RESERVED_POSITIONS:
            positions -= 2
        if positions and (spec.tokenizer_max_len or 0) > positions:
            problems.append(
                f"dataset.seq.tokenizer_max_len is {spec.tokenizer_max_len}, but {name} has "
                f"positions for {positions} tokens (max_position_embeddings is "
                f"{config.max_position_embeddings}). Set dataset.seq.tokenizer_max_len={positions}."
            )
        if problems:
            raise ConfigError(problems)

    def _try(self, proto: str) -> None:
        """Refuse a model that cannot encode a report alone, by encoding one of two tokens."""
        ids = torch.zeros(1, 2, dtype=torch.int64)
        self.network.eval()
        try:
            with torch.inference_mode():
                states = self.network(
                    input_ids=ids, attention_mask=torch.ones_like(ids)
                ).last_hidden_state
        except Exception as error:  # whatever a model raises that lacks images, sound, ...
            model = type(self.network).__name__
            raise ConfigError(
                f"model.encoder.proto: {proto} is a {model}, which does not encode text alone "
                f"({type(error).__name__}: {first_line(error)}). Give a text encoder."
            ) from error
        if states.shape[:2] != ids.shape:
            raise ConfigError(
                f"model.encoder.proto: {proto} gives {list(states.shape)} for two tokens, where a "
                "text encoder gives a vector for each."
            )

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"proto={self.proto}, pooling={self.pooling}, freeze={self.freeze}"


def mask_for(network: PreTrainedModel, attention_mask: Tensor) -> Tensor:
    """A mask [B, T] in the form in which a network takes it without a look at its contents.

    Transformers looks whether a mask [B, T] hides anything at all, for which a GPU has to be waited
    for in every pass; one that is expanded to [B, 1, T, T] it takes as it is.
    """
    if attention_mask.device.type == "cpu" or network.config._attn_implementation != "sdpa":
        return attention_mask
    return expanded(attention_mask)


def expanded(attention_mask: Tensor) -> Tensor:
    """Which token sees which: bool [B, 1, T, T] of a mask [B, T]."""
    batch, tokens = attention_mask.shape
    return attention_mask.bool()[:, None, None, :].expand(batch, 1, tokens, tokens)


def _random_bert(spec: DataSpec, settings: dict[str, Any], *, pooler: bool) -> PreTrainedModel:
    known = BertConfig().to_dict()
    unknown = [field for field in settings if field not in known]
    if unknown:
        raise ConfigError(
            f"model.encoder.{field} is not a setting of BertConfig.{nearest(field, known)}"
            for field in unknown
        )
    assert spec.tokenizer is not None
    vocabulary = {"vocab_size": spec.vocab_size, "pad_token_id": spec.tokenizer.pad_token_id}
    try:
        config = BertConfig(**{**vocabulary, **settings, "attn_implementation": "sdpa"})
        return BertModel(config, add_pooling_layer=pooler)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.encoder: BertConfig refuses these settings: {reason}") from error
