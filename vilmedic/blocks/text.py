"""Text encoders: a pretrained transformers model or a random BERT, giving reports or words."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel

from vilmedic.blocks.pretrained import (
    ATTENTION,
    Filled,
    ReadEncoder,
    first_line,
    load_config,
    load_model,
    read_pretrained,
)
from vilmedic.config.types import Between, ConfigOf, Frozen, Runtime, UsedWith
from vilmedic.datasets.aligned import DataSpec, same_tokenizer, seeded
from vilmedic.datasets.text import has_word_boundaries, load_tokenizer, special_tokens_around
from vilmedic.errors import ArgumentError, nearest
from vilmedic.log import counted

if TYPE_CHECKING:
    from vilmedic.blocks.lora import LoRA

log = logging.getLogger(__name__)

ON_TRIAL = 3
"""Tokens of the report for a trial pass through a published model, the last one padding."""


class TextEncoder(nn.Module):
    """Text encoder that gives one vector per report.

    Args:
        spec: the tokenizer and the length of the longest report.
        proto: the local folder or the hub name of a published model; null starts a BERT at random
            with the vocabulary of the tokenizer.
        pooling: how the vectors of a report's tokens become one: pooler is the model's own (a
            dense layer and tanh on the first token), cls the first token, mean and max go over all
            tokens but the padding.
        freeze: keep the encoder as it is; a number keeps the embeddings and that many layers.
        lora: train low-rank adapters of its linear layers instead of its weights.
        pretrained: the directory or a checkpoint of another run, whose text encoder is taken to
            start from; both need the same vocabulary.
        filled: given when a checkpoint fills the weights afterwards, so that none are loaded here.
        read_encoder: reads the weights that `pretrained` names.
        settings: fields of the transformers configuration class of the model (BertConfig for null).

    Attributes:
        hidden_size: width of the output.
        expands: whether the network gives the same result for an expanded mask.
    """

    named_by: ClassVar[str] = "proto"
    """The argument that names the model, for messages."""

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec],
        proto: str | None = None,
        pooling: Literal["pooler", "cls", "mean", "max"] = "pooler",
        freeze: bool | Frozen = False,
        lora: Annotated[LoRA | None, UsedWith("freeze", (False,))] = None,
        pretrained: str | None = None,
        filled: Runtime[Filled | None] = None,
        read_encoder: Runtime[ReadEncoder | None] = None,
        **settings: Annotated[Any, ConfigOf(default="bert", key="proto")],
    ) -> None:
        super().__init__()
        if spec.tokenizer is None or spec.vocab_size is None:
            raise ArgumentError(
                {
                    "": "needs reports, but the data set has none: use one with a seq section, "
                    "such as dataset.proto=ImSeq."
                }
            )
        if lora is not None:
            from vilmedic.blocks.lora import check_alone

            check_alone(freeze)
        self.proto = proto
        self.pooling = pooling
        self.freeze = freeze
        attention = settings.pop("attn_implementation", None) or ATTENTION
        if proto is None:
            self.network = _random_bert(spec, settings, attention, pooler=pooling == "pooler")
            self.expands = True
        else:
            saved = None if filled is None else filled.config_of("encoder")
            config = load_config(self.named_by, proto, settings, saved)
            published = filled is None and pretrained is None
            self.network = load_model(
                self.named_by,
                proto,
                config,
                pooler=pooling == "pooler",
                weights=published,
                attention=attention,
            )
            self.expands = self._try(proto)
        if pretrained is not None and filled is None:
            file = read_pretrained(read_encoder, "encoder", pretrained, self.network)
            file.check_vocabulary(spec)
            file.fill(self.network)
        self._check(spec)
        self.hidden_size: int = self.network.config.hidden_size
        self._frozen: list[nn.Module] = []
        if freeze is True:
            self.network.requires_grad_(False)
        elif freeze:
            from vilmedic.blocks.repeated import freeze_first, layers_of

            self._frozen = freeze_first(layers_of(self.network), freeze, proto or "the random BERT")
        if lora is not None and (filled is None or filled.adapters):
            lora.adapt(self.network, proto or "the random BERT", self._read_one_token)
        self.train()

    def train(self, mode: bool = True) -> TextEncoder:
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        if self.freeze is True:
            self.network.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode reports; the amount of padding does not change the result.

        Args:
            input_ids: ids of the tokens, [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, T].

        Returns:
            One vector per report, [B, hidden_size].
        """
        output = self.network(input_ids=input_ids, attention_mask=self.mask(attention_mask))
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

    def mask(self, attention_mask: Tensor) -> Tensor | dict[str, Tensor]:
        """Expand a mask [B, T] to the form that the network uses without reading its contents.

        Transformers checks whether a mask [B, T] hides anything, which waits for the GPU in every
        pass; a mask expanded to [B, 1, T, T] is used as it is.
        """
        if attention_mask.device.type == "cpu" or not self.expands:
            return attention_mask
        return expanded(self.network, attention_mask)

    def _check(self, spec: DataSpec) -> None:
        """Refuse an encoder that does not fit the tokenizer."""
        config: PretrainedConfig = self.network.config
        name = self.proto or "the random BERT"
        problems = {}
        if self.pooling == "pooler" and not hasattr(self.network, "pooler"):
            problems["pooling"] = (
                f"{name} ({config.model_type}) has no pooler. Allowed: cls, mean, max."
            )
        table: Any = self.network.get_input_embeddings()
        embeddings = table.num_embeddings
        if (spec.vocab_size or 0) > embeddings:
            problems[self.named_by] = (
                f"{name} has {embeddings} embeddings, but the tokenizer gives {spec.vocab_size} "
                "ids. Use the tokenizer of the encoder"
                + ("." if self.proto else " or a larger vocab_size.")
            )
        positions = getattr(config, "max_position_embeddings", None) or 0
        if positions > 0:  # -1 stands for any number
            positions -= _reserved_positions(self.network)
        if positions > 0 and (spec.tokenizer_max_len or 0) > positions:
            problems[""] = (
                f"{name} has positions for {positions} tokens (max_position_embeddings is "
                f"{config.max_position_embeddings}), but tokenizer_max_len of the reports is "
                f"{spec.tokenizer_max_len}. Set tokenizer_max_len={positions} there."
            )
        if problems:
            raise ArgumentError(problems)

    def _read_one_token(self) -> None:
        """Run the network."""
        self.network.eval()
        with torch.no_grad():
            self.network(input_ids=torch.zeros(1, 1, dtype=torch.int64))

    def _try(self, proto: str) -> bool:
        """Refuse a model that cannot encode a report alone, by a trial with two tokens.

        Returns:
            Whether it gives the same for an expanded mask as for a plain one. Causal models do not,
            because transformers adds to the mask.
        """
        known = getattr(self.network.config, "vocab_size", None) or ON_TRIAL
        ids = torch.arange(ON_TRIAL).unsqueeze(0) % known
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        self.network.eval()
        try:
            with torch.inference_mode():
                states = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
                short = self.network(input_ids=ids[:, :-1], attention_mask=mask[:, :-1])
        except Exception as error:  # models that need images, sound, ... raise many kinds
            model = type(self.network).__name__
            raise ArgumentError(
                {
                    self.named_by: f"{proto} is a {model}, which does not encode text alone "
                    f"({type(error).__name__}: {first_line(error)}). Give a text encoder."
                }
            ) from error
        if states.shape[:2] != ids.shape:
            raise ArgumentError(
                {
                    self.named_by: f"{proto} gives {list(states.shape)} for {ON_TRIAL} tokens, "
                    "where a text encoder gives a vector for each."
                }
            )
        if not torch.allclose(short.last_hidden_state, states[:, :-1], rtol=1e-3, atol=1e-3):
            log.warning(
                "%s is a %s, which does not ignore padding: the vector of a report depends on the "
                "longest report in its batch.",
                proto,
                type(self.network).__name__,
            )
        if self.network.config._attn_implementation != "sdpa" or _windows(self.network) is None:
            return False
        with torch.inference_mode():
            same = self.network(input_ids=ids, attention_mask=expanded(self.network, mask))
        return torch.allclose(same.last_hidden_state[:, :-1], states[:, :-1], rtol=0, atol=1e-4)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        attention = self.network.config._attn_implementation
        return (
            f"proto={self.proto}, pooling={self.pooling}, freeze={self.freeze}, "
            f"attention={attention}, dtype={self.network.dtype}"
        )


class FrozenReports(TextEncoder):
    """Frozen published text encoder that compares reports; always in evaluation mode.

    A report vector is the mean over its tokens, as in Sentence-BERT (Reimers and Gurevych 2019,
    arXiv 1908.10084). Weights that its file lacks are random, but the same each time.

    Args:
        spec: the tokenizer and the length of the longest report.
        name: the local folder or the hub name of the model, with its tokenizer.

    Raises:
        ConfigError: there is no such model, or it reads another tokenizer than that of the data.
    """

    named_by: ClassVar[str] = "encoder"

    def __init__(self, spec: DataSpec, name: str) -> None:
        with torch.inference_mode(False), seeded(0):
            super().__init__(spec=spec, proto=name, pooling="mean", freeze=True)
        assert spec.tokenizer is not None
        try:
            own = load_tokenizer(name)
        except ValueError as error:
            raise ArgumentError({self.named_by: str(error)}) from error
        if not same_tokenizer(own, spec.tokenizer):
            raise ArgumentError(
                {
                    self.named_by: f"{name} has another tokenizer than the reports, whose numbers "
                    f"mean other words to it. Set dataset.seq.tokenizer={name}."
                }
            )
        digest = hashlib.sha256()
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.sha256 = digest.hexdigest()

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode reports without a gradient; see `TextEncoder.forward`."""
        return super().forward(input_ids, attention_mask)


class WordEncoder(nn.Module):
    """Text encoder of GLoRIA (Huang et al. 2021): one vector per word and one per report.

    The states of the last layers are summed, then the subword pieces of each word; the opening and
    the closing special token count as words. The report vector is the mean over its words.

    Args:
        spec: the tokenizer and the length of the longest report.
        proto: the local folder or the hub name of a published model; null starts a BERT at random
            with the vocabulary of the tokenizer.
        last_n_layers: layers whose states are added up, counted from the last.
        freeze: keep the encoder as it is; a number keeps the embeddings and that many layers.
        lora: train low-rank adapters of its linear layers instead of its weights.
        pretrained: the directory or a checkpoint of another run, whose text encoder is taken to
            start from; both need the same vocabulary.
        filled: given when a checkpoint fills the weights afterwards, so that none are loaded here.
        read_encoder: reads the weights that `pretrained` names.
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
        freeze: bool | Frozen = False,
        lora: Annotated[LoRA | None, UsedWith("freeze", (False,))] = None,
        pretrained: str | None = None,
        filled: Runtime[Filled | None] = None,
        read_encoder: Runtime[ReadEncoder | None] = None,
        **settings: Annotated[Any, ConfigOf(default="bert", key="proto")],
    ) -> None:
        super().__init__()
        self.text = TextEncoder(
            spec=spec,
            proto=proto,
            pooling="mean",
            freeze=freeze,
            lora=lora,
            pretrained=pretrained,
            filled=filled,
            read_encoder=read_encoder,
            **settings,
        )
        layers = self.text.network.config.num_hidden_layers
        if not 1 <= last_n_layers <= layers:
            raise ArgumentError(
                {
                    "last_n_layers": f"given {last_n_layers}, but {proto or 'the random BERT'} has "
                    f"{counted(layers, 'layer')}. Allowed: integer from 1 to {layers}."
                }
            )
        assert spec.tokenizer is not None
        if not has_word_boundaries(spec.tokenizer):
            raise ArgumentError(
                {
                    "": "the tokenizer of the reports takes a sentence as one word, but the model "
                    "compares words with regions of the image. Use a tokenizer that splits reports "
                    "into words first, as those of BERT, RoBERTa and T5 do, or null to build a "
                    "vocabulary of words."
                }
            )
        self.opening, self.closing = special_tokens_around(spec.tokenizer)
        self.last_n_layers = last_n_layers
        self.hidden_size: int = self.text.hidden_size
        self._record_states()

    def _record_states(self) -> None:
        """Prepare transformers for returning the states of all layers.

        It would do so in the first pass that requests them, which could then not be traced.
        """
        ids = torch.zeros(1, 1, dtype=torch.int64)
        self.text.network.eval()
        with torch.no_grad():
            self.text.network(input_ids=ids, output_hidden_states=True)
        self.text.train()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, word_ids: Tensor) -> Words:
        """Encode reports; the amount of padding does not change the result.

        Args:
            input_ids: ids of the tokens, [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, T].
            word_ids: the word of each token, counted from 0, special tokens included; -1 for
                padding, [B, T].
        """
        output = self.text.network(
            input_ids=input_ids,
            attention_mask=self.text.mask(attention_mask),
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


class Words(NamedTuple):
    """Word vectors of a batch of reports.

    Args:
        report: one vector per report, [B, D].
        words: one vector per word, [B, T, D], zero behind the last one; T is the number of
            tokens.
        mask: which of them represent the report, [B, T]: the opening special token and all
            words, but not the closing special token.
    """

    report: Tensor
    words: Tensor
    mask: Tensor


def expanded(network: PreTrainedModel, attention_mask: Tensor) -> Tensor | dict[str, Tensor]:
    """Return which token sees which, bool [B, 1, T, T], of a mask [B, T]; by layer type if needed.

    Args:
        network: the text encoder.
        attention_mask: 1 for tokens, 0 for padding, [B, T].
    """
    batch, tokens = attention_mask.shape
    every = attention_mask.bool()[:, None, None, :].expand(batch, 1, tokens, tokens)
    windows = _windows(network)
    if not windows:
        return every
    place = torch.arange(tokens, device=attention_mask.device)
    distance = (place[:, None] - place[None, :]).abs()
    return {
        kind: every if reach is None else every & (distance <= reach)
        for kind, reach in windows.items()
    }


def _windows(network: PreTrainedModel) -> dict[str, int | None] | None:
    """Return how far a token sees to each side, by layer type; None stands for all tokens.

    Returns:
        Empty if all layers see all tokens; None if that is not known.
    """
    config = network.config
    if not set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return {}
    if config.model_type != "modernbert":
        return None
    return {"full_attention": None, "sliding_attention": config.sliding_window}


def _reserved_positions(network: PreTrainedModel) -> int:
    """Return the offset of the first position, which RoBERTa and its family have."""
    tables = [
        module
        for name, module in network.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    reserved = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]
    return max(reserved, default=0)


def _random_bert(
    spec: DataSpec, settings: dict[str, Any], attention: str, *, pooler: bool
) -> PreTrainedModel:
    known = BertConfig().to_dict()
    unknown = [field for field in settings if field not in known]
    if unknown:
        raise ArgumentError(
            {field: f"is not a setting of BertConfig.{nearest(field, known)}" for field in unknown}
        )
    assert spec.tokenizer is not None
    vocabulary = {"vocab_size": spec.vocab_size, "pad_token_id": spec.tokenizer.pad_token_id}
    try:
        config = BertConfig(**{**vocabulary, **settings, "attn_implementation": attention})
        return BertModel(config, add_pooling_layer=pooler)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ArgumentError({"": f"BertConfig refuses these settings: {reason}"}) from error
