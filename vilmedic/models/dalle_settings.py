"""Settings of DALLE and its frozen VAE, compared with those of a checkpoint."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from vilmedic.config.types import (
    AtLeast,
    Between,
    Count,
    Dropout,
    Normalization,
    Share,
    Side,
    Temperature,
    Weight,
    Width,
)
from vilmedic.errors import ArgumentError, nearest

ATTENTION_TYPES = ("full", "axial_row", "axial_col")
REFUSED = {
    "reversible": (
        "reversible layers are not offered. activation_checkpointing=True saves "
        "memory instead, and leaves the result as it is"
    ),
    "stable": "the stabilised softmax is not offered; attention is computed in a stable form as is",
    "sandwich_norm": "normalisation behind a branch is not offered",
    "shared_attn_ids": "layers that share their attention are not offered",
    "shared_ff_ids": "layers that share their feed-forward part are not offered",
    "sparse_attn": "sparse attention is not offered; attn_types has axial layers",
    "optimize_for_inference": "generation always caches, axial layers included; leave this out",
}
"""Options of dalle-pytorch that this model does not have, and why they cannot be turned on."""
POSITIONS = "transformer.pos_emb"
DEFAULTED = ("heads", "dim_head", "attn_types")
"""Settings that no weight shows; what a file leaves out had its default, which never changed."""
STATED = ("text_seq_len", "num_text_tokens")
"""Settings that count where a file states them, as those behind them do."""
SWITCHES = ("rotary_emb", "shift_tokens", "share_input_output_emb")
WITHOUT_EFFECT = ("sparse_attn", "optimize_for_inference")
"""Options that dalle-pytorch ignores, or that change how it computes and not what."""
_INNER = re.compile(r"(transformer\.layers\.layers\.\d+\.[01]\.)(?:fn\.){2,}(.*)")


class TransformerSettings:
    """The transformer of DALLE.

    Args:
        dim: width.
        depth: number of layers.
        num_text_tokens: size of the text vocabulary; null takes that of the tokenizer.
        text_seq_len: text positions; shorter reports are filled up, none may be longer.
        heads: attention heads.
        dim_head: channels of a head.
        attn_types: attention of the layers, repeated as often as needed: full, axial_row (image
            positions see the text and their row) or axial_col (the text and their column).
        attn_dropout: dropout of what attention gives.
        ff_dropout: dropout inside the feed-forward part.
        loss_img_weight: weight of the image loss; the text loss has weight 1, and the sum is
            divided by both.
        share_input_output_emb: use the weights of the output layer as embeddings.
        rotary_emb: positions turn queries, keys and values; otherwise they are learned vectors.
        shift_tokens: positions take part of their channels from those before them.
        activation_checkpointing: less memory in training for a third more time.
        null_cond_prob: share of samples whose text is dropped in training, which guidance
            (ensemblor.cond_scale) needs.
        reversible: not offered; only false.
        stable: not offered; only false.
        sandwich_norm: not offered; only false.
        sparse_attn: not offered; only false.
        optimize_for_inference: not offered; only false.
        shared_attn_ids: not offered; only null.
        shared_ff_ids: not offered; only null.
    """

    def __init__(
        self,
        *,
        dim: Annotated[int, Between(4, 16384)],
        depth: Annotated[int, Between(1, 512)],
        num_text_tokens: Count | None = None,
        text_seq_len: Annotated[int, Between(1, 8192)] = 256,
        heads: Annotated[int, Between(1, 256)] = 8,
        dim_head: Annotated[int, Between(1, 1024)] = 64,
        attn_types: list[str] | str | None = None,
        attn_dropout: Dropout = 0.0,
        ff_dropout: Dropout = 0.0,
        loss_img_weight: Weight = 7.0,
        share_input_output_emb: bool = False,
        rotary_emb: bool = True,
        shift_tokens: bool = True,
        activation_checkpointing: bool = False,
        null_cond_prob: Share = 0.0,
        reversible: bool = False,
        stable: bool = False,
        sandwich_norm: bool = False,
        sparse_attn: bool | list[bool] = False,
        optimize_for_inference: bool = False,
        shared_attn_ids: list[Annotated[int, AtLeast(0)]] | None = None,
        shared_ff_ids: list[Annotated[int, AtLeast(0)]] | None = None,
    ) -> None:
        given = {
            "reversible": reversible,
            "stable": stable,
            "sandwich_norm": sandwich_norm,
            "sparse_attn": sparse_attn if isinstance(sparse_attn, bool) else any(sparse_attn),
            "optimize_for_inference": optimize_for_inference,
            "shared_attn_ids": shared_attn_ids,
            "shared_ff_ids": shared_ff_ids,
        }
        problems = {
            name: f"given {value}, but {REFUSED[name]}." for name, value in given.items() if value
        }
        types = [attn_types] if isinstance(attn_types, str) else attn_types or ["full"]
        if unknown := [_unknown_attention(kind) for kind in types if kind not in ATTENTION_TYPES]:
            problems["attn_types"] = " ".join(unknown)
        if dim % 4:
            problems["dim"] = (
                f"given {dim}, allowed: multiples of 4, as the token shift moves quarters."
            )
        if rotary_emb and dim_head < 6:
            problems["dim_head"] = f"given {dim_head}, but rotary embeddings need at least 6."
        if problems:
            raise ArgumentError(problems)
        self.dim, self.depth, self.heads, self.dim_head = dim, depth, heads, dim_head
        self.num_text_tokens, self.text_seq_len = num_text_tokens, text_seq_len
        self.attn_types = types
        self.attn_dropout, self.ff_dropout = attn_dropout, ff_dropout
        self.loss_img_weight, self.null_cond_prob = loss_img_weight, null_cond_prob
        self.share_input_output_emb = share_input_output_emb
        self.rotary_emb, self.shift_tokens = rotary_emb, shift_tokens
        self.activation_checkpointing = activation_checkpointing

    def layers(self) -> dict[str, Any]:
        """The arguments that the transformer itself takes."""
        names = (
            *("dim", "depth", "heads", "dim_head", "attn_types", "attn_dropout", "ff_dropout"),
            *("rotary_emb", "shift_tokens", "activation_checkpointing"),
        )
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class FrozenVAE:
    """The trained VAE that makes tokens of images, and images of tokens.

    What is left out is taken from the checkpoint; what is given has to agree with it.

    Args:
        ckpt: its checkpoint: a file, or a run directory, of which the best one is taken.
        image_size: side of the images in pixels.
        num_tokens: number of codes in its codebook.
        codebook_dim: width of a code's vector.
        num_layers: times the sides are halved.
        num_resnet_blocks: residual blocks on either side.
        hidden_dim: channels of the convolutions.
        channels: channels of an image.
        smooth_l1_loss: how it was trained; has no effect here.
        temperature: how it was trained; has no effect here.
        straight_through: how it was trained; has no effect here.
        kl_div_loss_weight: how it was trained; has no effect here.
        normalization: mean and standard deviation of each channel.
    """

    ckpt: str
    image_size: Side | None = None
    num_tokens: Count | None = None
    codebook_dim: Width | None = None
    num_layers: Annotated[int, Between(1, 14)] | None = None
    num_resnet_blocks: Annotated[int, Between(0, 256)] | None = None
    hidden_dim: Width | None = None
    channels: Annotated[int, Between(1, 3)] | None = None
    smooth_l1_loss: bool | None = None
    temperature: Temperature | None = None
    straight_through: bool | None = None
    kl_div_loss_weight: Weight | None = None
    normalization: Normalization | None = None

    def given(self) -> dict[str, Any]:
        """The settings that are given, without the checkpoint."""
        settings = asdict(self)
        settings.pop("ckpt")
        return {name: value for name, value in settings.items() if value is not None}


def setting_differences(
    config: Any, settings: TransformerSettings, num_text_tokens: int
) -> list[str]:
    """Where the transformer of a checkpoint is not the one that is configured.

    Args:
        config: the configuration in the file, if there is one; its node `model.dalle` counts.
        settings: what is configured.
        num_text_tokens: size of the text vocabulary.

    Returns:
        A line for each difference, and for each option that is not offered.
    """
    node = ((config or {}).get("model") or {}).get("dalle") or {}
    if not node:
        return []
    defaults = inspect.signature(TransformerSettings).parameters
    stated = {name: node.get(name, defaults[name].default) for name in DEFAULTED}
    stated |= {name: node[name] for name in (*STATED, *SWITCHES) if node.get(name) is not None}
    stated["attn_types"] = _repeated(stated["attn_types"], settings.depth)
    own = vars(settings) | {"num_text_tokens": num_text_tokens}
    own["attn_types"] = _repeated(settings.attn_types, settings.depth)
    found = [
        f"{name} is {value}, the configuration says {own[name]}"
        for name, value in stated.items()
        if value != own[name]
    ]
    refused = [name for name in REFUSED if name not in WITHOUT_EFFECT and node.get(name)]
    return found + [f"{name} is {node[name]}, but {REFUSED[name]}" for name in refused]


def position_differences(weights: Mapping[str, Tensor], own: Tensor | None) -> list[str]:
    """Return whether a file turns by other positions, [1, n, D], than the model."""
    given = weights.get(POSITIONS)
    if given is None or own is None or given.shape != own.shape:
        return []  # names and shapes are compared in any case
    if torch.allclose(given.float(), own.float().cpu(), rtol=1e-3, atol=1e-3):
        return []
    return [
        f"the positions ({POSITIONS}) are others, so dim_head, text_seq_len or the number of image "
        "tokens are not those of the configuration"
    ]


def is_other_vae(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Return whether a file holds another VAE than the one in front of the model."""
    given = {name: weights.get(f"vae.{name}") for name in own}
    return any(
        value is not None
        and value.shape == own[name].shape
        and not torch.equal(value.to(own[name].dtype), own[name].cpu())
        for name, value in given.items()
    )


def todays_names(
    weights: Mapping[str, Tensor],
    names: Iterable[str],
    positions: Tensor | None,
    *,
    shift_tokens: bool,
) -> dict[str, Tensor]:
    """Weights of dalle-pytorch before version 1.4, which nested layers less, under our names.

    Before version 1.1.4 it also left out the last position, which nothing is turned by.

    Args:
        weights: by their names in a file, with or without a prefix.
        names: those of the model.
        positions: those of the model, [1, n, D], or None.
        shift_tokens: whether the model shifts; files with it nest once more.
    """
    nested = "fn." * (3 if shift_tokens else 2)
    todays = {_INNER.sub(rf"\1{nested}\2", name): name for name in names}
    named = {}
    for name, value in weights.items():
        before, found, after = name.partition("transformer.layers.")
        named[before + todays.get(found + after, found + after)] = value
        if positions is None or not name.endswith(POSITIONS):
            continue
        if value.shape == positions[:, None, :-1].shape:
            named[name] = torch.cat((value[:, 0], positions[:, -1:].to(value)), dim=1)
    return named


def _unknown_attention(kind: str) -> str:
    offered = ", ".join(ATTENTION_TYPES)
    if kind in ("conv_like", "sparse", "mlp"):
        return f"the attention '{kind}' of dalle-pytorch is not offered. Allowed: {offered}."
    return f"given '{kind}', allowed: {offered}.{nearest(kind, ATTENTION_TYPES)}"


def _repeated(kinds: Any, depth: int) -> list[str]:
    """The attention of each layer."""
    kinds = [kinds] if isinstance(kinds, str) else list(kinds or ["full"])
    return [kinds[layer % len(kinds)] for layer in range(depth)]
