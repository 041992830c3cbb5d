"""DALLE: a transformer over report tokens followed by image tokens (Ramesh et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.blocks.linear import linear_of_few
from vilmedic.blocks.positions import AxialPositions
from vilmedic.blocks.text_image_transformer import TextImageTransformer, TransformerCache
from vilmedic.config.types import Runtime
from vilmedic.datasets.aligned import DataSpec
from vilmedic.errors import ArgumentError, ConfigError, DataError
from vilmedic.losses.linear_cross_entropy import linear_cross_entropy
from vilmedic.models.contract import Batch, Model
from vilmedic.models.dalle_settings import (
    FrozenVAE,
    TransformerSettings,
    is_other_vae,
    position_differences,
    setting_differences,
    todays_names,
)
from vilmedic.models.vae import load_vae

Output = tuple[Tensor, Tensor]  # weight and bias of an output layer
BEGIN = 0  # the begin token shares its vector with the first word of the vocabulary


class DALLE(Model):
    """Text-to-image: learns the tokens of a report followed by those of its image.

    "Zero-Shot Text-to-Image Generation", arXiv:2102.12092, section 2.2. Images become tokens by a
    VAE that was trained before and stays as it is. Weights have the names and shapes of
    dalle-pytorch's `DALLE` (version 1.6.6).

    Args:
        spec: data properties: tokenizer, label names, normalisation.
        vae: the frozen VAE.
        dalle: the transformer.
    """

    image_options: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mean": ([0], [0, 0, 0]),
        "std": ([1], [1, 1, 1]),
        "views": (1,),
        "multi_image": (1,),
    }
    reads_reports: ClassVar[bool] = True
    prefixes: ClassVar[tuple[str, ...]] = ("", "dalle.")

    def __init__(
        self, *, spec: Runtime[DataSpec], vae: FrozenVAE, dalle: TransformerSettings
    ) -> None:
        super().__init__()
        words = _vocabulary_size(spec, dalle)
        spec.check_pixels("DALLE")
        self.settings, self.vae_ckpt = dalle, vae.ckpt
        self.vae = load_vae(vae.ckpt, vae.given())
        side = self.vae.image_size // 2**self.vae.num_layers
        self.text_seq_len, self.image_seq_len = dalle.text_seq_len, side**2
        # each text position has a token of its own for where a report has ended
        self.num_text_tokens = words + dalle.text_seq_len
        self.num_image_tokens = self.vae.num_tokens
        self.loss_img_weight, self.null_cond_prob = dalle.loss_img_weight, dalle.null_cond_prob
        self.filler = spec.filler
        self.transformer = TextImageTransformer(
            text_len=dalle.text_seq_len + 1, side=side, **dalle.layers()
        )
        output = nn.Linear(dalle.dim, self.num_text_tokens + self.num_image_tokens)
        self.to_logits = nn.Sequential(nn.LayerNorm(dalle.dim), output)
        if dalle.share_input_output_emb:
            self.text_emb: nn.Module = _Shared(output, 0, self.num_text_tokens)
            self.image_emb: nn.Module = _Shared(output, self.num_text_tokens, output.out_features)
        else:
            self.text_emb = nn.Embedding(self.num_text_tokens, dalle.dim)
            self.image_emb = nn.Embedding(self.num_image_tokens, dalle.dim)
        self.learned_positions = not dalle.rotary_emb
        if self.learned_positions:
            self.text_pos_emb = nn.Embedding(dalle.text_seq_len + 1, dalle.dim)
            self.image_pos_emb = AxialPositions(dalle.dim, side)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of reports and images.

        loss = (text + loss_img_weight * image) / (1 + loss_img_weight), each the mean
        cross-entropy over its positions, those behind the end of a report included.

        Args:
            batch: `input_ids` and `attention_mask` [B, T]; `images` [B, C, H, W] in 0..1, or their
                tokens as `image_tokens` [B, N].

        Returns:
            The scalars `loss`, `text_loss` and `image_loss`.

        Raises:
            ConfigError: the data set gives no reports or no images.
            DataError: a token is outside its vocabulary.
        """
        mask = self._attention_mask(batch)
        text = self.text_tokens(batch["input_ids"], mask)
        image = self.image_tokens(batch)
        hidden = self.to_logits[0](self.states(text, image))
        hidden = hidden.split((self.text_seq_len, self.image_seq_len), dim=1)
        losses = (
            linear_cross_entropy(states.flatten(0, 1), *output, tokens.flatten())
            for states, output, tokens in zip(hidden, self._outputs(), (text, image), strict=True)
        )
        text_loss, image_loss = losses
        weight = self.loss_img_weight
        loss = (text_loss + weight * image_loss) / (1 + weight)
        return {"loss": loss, "text_loss": text_loss.detach(), "image_loss": image_loss.detach()}

    def repeated_blocks(self) -> list[nn.Module]:
        """The layers of the transformer; the frozen VAE gives its tokens to the last bit."""
        return list(self.transformer.layers.layers)

    def text_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Reports as `text_seq_len` tokens: where a report has ended, the token of the position.

        Args:
            ids: int64 [B, T], T at most `text_seq_len`.
            mask: 1 for the tokens of the report, [B, T]; a row of zeros is no text at all.

        Returns:
            int64 [B, text_seq_len].

        Raises:
            DataError: a token is outside the vocabulary, or the report is too long.
        """
        length, words = self.text_seq_len, self.num_text_tokens - self.text_seq_len
        if ids.shape[1] > length:
            raise DataError(f"Reports of {ids.shape[1]} tokens; text_seq_len={length}.")
        inside = functional.pad(mask, (0, length - ids.shape[1])) != 0
        ids = functional.pad(ids, (0, length - ids.shape[1]))
        if not torch.compiler.is_compiling() and ids.device.type == "cpu":
            _check_range(ids[inside], words, "report tokens", "num_text_tokens")
        if self.filler is not None:
            # As dalle-pytorch: the padding token is a word, and the id 0 stands for no word. A
            # dropped text is all zeros there.
            empty = ~inside.any(dim=1, keepdim=True)
            ids = ids.masked_fill(~inside & ~empty, self.filler)
            inside = (ids != 0) & ~empty
        own = torch.arange(words, words + length, device=ids.device)
        return torch.where(inside, ids, own)

    def image_tokens(self, batch: Batch) -> Tensor:
        """The tokens of the images of a batch: int64 [B, N], rows from the top."""
        if "image_tokens" in batch:
            tokens = batch["image_tokens"]
            if not torch.compiler.is_compiling() and tokens.device.type == "cpu":
                _check_range(tokens, self.num_image_tokens, "image tokens", "num_tokens")
            return tokens
        if "images" not in batch:
            raise ConfigError(
                "DALLE learns from images, but the data set gives none. Use dataset.proto=ImSeq."
            )
        images = batch["images"]
        size = self.vae.image_size
        if images.ndim != 4 or images.shape[-2:] != (size, size):
            raise ConfigError(
                f"DALLE takes one image per sample of {size} x {size} pixels, but the data set "
                f"gives {list(images.shape)}. Set the resize and crop of the images to {size}, "
                "and leave out multi_image and views."
            )
        # Not in reduced precision, so that tokens equal cached ones.
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.vae.get_codebook_indices(images)
        # A copy, as autograd cannot save tensors of inference mode.
        inference = not torch.compiler.is_compiling() and tokens.is_inference()
        return tokens.clone() if inference else tokens

    def states(self, text: Tensor, image: Tensor) -> Tensor:
        """The transformer's states of whole sequences, before the output layer.

        Args:
            text: int64 [B, text_seq_len].
            image: int64 [B, N].

        Returns:
            [B, text_seq_len + N, dim]; the state of a position predicts the token after it.
        """
        states: Tensor = self.transformer(self.embed(text, image[:, :-1]))
        return states

    def embed(self, text: Tensor, image: Tensor) -> Tensor:
        """Embed the begin token, a text and the first n image tokens: [B, 1 + T + n, dim]."""
        text = functional.pad(text, (1, 0), value=BEGIN)
        embedded = self.text_emb(text)
        if self.learned_positions:
            embedded = embedded + self.text_pos_emb.weight
        if not image.shape[1]:
            return embedded
        places = torch.arange(image.shape[1], device=image.device)
        return torch.cat((embedded, self.embed_image(image, places)), dim=1)

    def embed_image(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Embed image tokens [B, n] at their places [n] in the image: [B, n, dim]."""
        embedded: Tensor = self.image_emb(tokens)
        return embedded + self.image_pos_emb(places) if self.learned_positions else embedded

    def image_output(self) -> Output:
        """Weight and bias of the output layer for image tokens, in the dtype of autocast.

        They are parts of larger ones, which autocast would convert at every use.
        """
        weight, bias = self._outputs()[1]
        kind = weight.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return weight.to(dtype), bias.to(dtype)

    def image_logits(self, states: Tensor, output: Output | None = None) -> Tensor:
        """Logits of the next image token, [B, num_image_tokens].

        Args:
            states: of the positions before, [B, dim].
            output: what `image_output` gave, where it is used more than once.
        """
        return linear_of_few(self.to_logits[0](states), *output or self.image_output())

    def begin_image(
        self,
        text: Tensor,
        image: Tensor,
        cache: TransformerCache | None,
        output: Output | None = None,
    ) -> Tensor:
        """Read a text and the first n image tokens, into a cache: logits of the next, [B, K]."""
        states = self.transformer(self.embed(text, image), cache)
        return self.image_logits(states[:, -1], output)

    def next_image_token(
        self, token: Tensor, place: Tensor, cache: TransformerCache, output: Output | None = None
    ) -> Tensor:
        """Logits of the image token after one, [B, K].

        Args:
            token: the token, [B].
            place: its place in the image, from 0, int64 [1].
            cache: all before it; it is added.
            output: see `image_logits`.
        """
        embedded = self.embed_image(token[:, None], place)
        position = place + self.text_seq_len + 1
        return self.image_logits(self.transformer.step(embedded, position, cache)[:, 0], output)

    def stated_vae(self) -> dict[str, Any]:
        """Size of the images and normalization of the VAE."""
        scale = self.vae.pixels.mean_and_std
        normalization = None if scale is None else [list(map(float, part)) for part in scale]
        return {"image_size": self.vae.image_size, "normalization": normalization}

    def translate(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of older versions of dalle-pytorch under our names."""
        shift = self.settings.shift_tokens
        own = self.state_dict()
        return todays_names(weights, own, self.transformer.pos_emb, shift_tokens=shift)

    def differences(self, weights: Mapping[str, Tensor], config: Any) -> list[str]:
        """Return why weights that fit by name and shape would have another meaning here.

        Args:
            weights: of a checkpoint, under our names.
            config: the configuration in it, if there is one.

        Returns:
            A line for each reason.
        """
        words = self.num_text_tokens - self.text_seq_len
        found = setting_differences(config, self.settings, words)
        found += position_differences(weights, self.transformer.pos_emb)
        if is_other_vae(weights, self.vae.state_dict()):
            found.append(
                f"its VAE is another one than that of vae.ckpt={self.vae_ckpt}, whose tokens "
                "mean other things (as vae.ckpt the checkpoint itself gives its own)"
            )
        return found

    def _outputs(self) -> tuple[Output, Output]:
        """Weight and bias of the output layer for text tokens, and those for image tokens."""
        layer: Any = self.to_logits[1]
        sizes = (self.num_text_tokens, self.num_image_tokens)
        text, image = zip(layer.weight.split(sizes), layer.bias.split(sizes), strict=True)
        return text, image

    def _attention_mask(self, batch: Batch) -> Tensor:
        if "input_ids" not in batch:
            raise ConfigError(
                "DALLE learns from reports, but the data set gives none. Use dataset.proto=ImSeq."
            )
        mask = batch["attention_mask"]
        if self.training and self.null_cond_prob > 0:
            dropped = torch.rand(len(mask), device=mask.device) < self.null_cond_prob
            mask = mask.masked_fill(dropped[:, None], 0)
        return mask


class _Shared(nn.Module):
    """Embeddings that are rows of a linear layer's weight."""

    def __init__(self, linear: nn.Linear, start: int, end: int) -> None:
        super().__init__()
        self.linear = linear
        self.start, self.end = start, end

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.linear.weight[self.start : self.end])


def _vocabulary_size(spec: DataSpec, dalle: TransformerSettings) -> int:
    """The number of words, which the tokenizer and the configuration have to agree on."""
    if spec.tokenizer is None or spec.vocab_size is None:
        raise ConfigError(
            "DALLE learns from reports, but the data set gives none. Use dataset.proto=ImSeq."
        )
    words = dalle.num_text_tokens or spec.vocab_size
    if words < spec.vocab_size:
        raise ArgumentError(
            {
                "dalle.num_text_tokens": f"given {words}, but the tokenizer has {spec.vocab_size} "
                "tokens, and those above would be outside the vocabulary. Leave the key out, or "
                "give the tokenizer that belongs to it."
            }
        )
    longest = spec.tokenizer_max_len
    if longest is not None and longest > dalle.text_seq_len:
        raise ArgumentError(
            {
                "dalle.text_seq_len": f"given {dalle.text_seq_len}, but tokenizer_max_len of the "
                f"reports is {longest}. Allowed: integer >= {longest}."
            }
        )
    return words


def _check_range(tokens: Tensor, size: int, what: str, key: str) -> None:
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise DataError(
            f"The {what} reach from {int(tokens.min())} to {int(tokens.max())}, but {key} is "
            f"{size}. Allowed: integer from 0 to {size - 1}."
        )
