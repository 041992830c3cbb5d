"""Small models, tokenizers and batches for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from vilmedic.blocks.projection import PairedProjection, VisualEmbedder, VisualProjection
from vilmedic.blocks.text import TextEncoder, WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.checkpoints.encoders import read_encoder
from vilmedic.datasets.aligned import DataSpec
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.gloria import GLoRIA
from vilmedic.models.simclr import SimCLR
from vilmedic.models.vae import VAE

WORDS = [
    "no",
    "acute",
    "small",
    "large",
    "left",
    "right",
    "pleural",
    "effusion",
    "heart",
    "normal",
    ".",
]
TINY_BERT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def tiny_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with [CLS] and [SEP] around a report."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def tiny_spec(max_len: int = 16, **fields: Any) -> DataSpec:
    return DataSpec(tokenizer=tiny_tokenizer(), tokenizer_max_len=max_len, **fields)


def save_tiny_bert(folder: Path, seed: int = 0) -> Path:
    """Save a BERT with its tokenizer; its random weights tell reports apart."""
    torch.manual_seed(seed)
    config = BertConfig(**TINY_BERT, vocab_size=tiny_spec().vocab_size, initializer_range=0.5)
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_cnn(**settings: Any) -> VisionEncoder:
    """A ShuffleNet with 0.34 million parameters and 1024 features; images from 32 x 32 pixels."""
    return VisionEncoder(
        **{"backbone": "shufflenet_v2_x0_5", "pretrained": False, **settings},
        read_encoder=read_encoder,
    )


def tiny_encoder(spec: DataSpec | None = None, **settings: Any) -> TextEncoder:
    return TextEncoder(
        spec=spec or tiny_spec(), read_encoder=read_encoder, **{**TINY_BERT, **settings}
    )


def tiny_convirt(spec: DataSpec | None = None, **settings: Any) -> ConVIRT:
    spec = spec or tiny_spec()
    projection = PairedProjection(
        visual_embedding_dim=1024, textual_embedding_dim=16, projection_dim=8
    )
    return ConVIRT(
        spec=spec,
        encoder=tiny_encoder(spec),
        cnn=tiny_cnn(),
        projection=projection,
        **{"loss": ConVIRTLoss(), **settings},
    )


def tiny_simclr(**settings: Any) -> SimCLR:
    projection = VisualProjection(visual_embedding_dim=1024, projection_dim=8)
    parts: dict[str, Any] = {"loss": NTXentLoss(tau=0.5), **settings}
    return SimCLR(cnn=tiny_cnn(), projection=projection, **parts)


def tiny_gloria(spec: DataSpec | None = None, **settings: Any) -> GLoRIA:
    """A GLoRIA with 4 x 4 regions for 32 x 32 images: the second stage of a ShuffleNet."""
    parts: dict[str, Any] = {
        "encoder": WordEncoder(spec=spec or tiny_spec(), last_n_layers=1, **TINY_BERT),
        "cnn": tiny_cnn(),
        "visual_embedder": VisualEmbedder(interm_feature_dim=48, feature_dim=1024),
        "loss": GLoRIALoss(),
        "upsample": None,
        "local_layer": "stage2",
    }
    return GLoRIA(spec=spec or tiny_spec(), **{**parts, **settings})


def tiny_views(size: int = 4, image_size: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with two views per sample, in the form that `prepare` returns."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 2, 3, image_size, image_size, generator=random)
    return {"index": torch.arange(size), "images": images}


def several_images(
    batch: dict[str, torch.Tensor], most: int = 3, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Give each sample of a batch up to `most` images: [B, N, ...]."""
    random = torch.Generator().manual_seed(seed + 1)
    images = batch["images"]
    more = torch.randn(len(images), most, *images.shape[1:], generator=random)
    more[:, 0] = images
    counts = torch.arange(len(images)) % most + 1
    mask = torch.arange(most) < counts[:, None]
    return {
        **batch,
        "images": more * mask.view(*mask.shape, *[1] * (images.ndim - 1)),
        "images_mask": mask,
    }


def tiny_batch(size: int = 4, image_size: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images and reports of different lengths, in the form that `prepare` returns."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 4 + len(WORDS), (size, 16), generator=random)
    lengths = torch.randint(3, 17, (size, 1), generator=random)
    mask = (torch.arange(16) < lengths).long()
    ids[:, 0] = 2
    words = torch.arange(16).expand(size, 16).masked_fill(mask == 0, -1)
    return {
        "index": torch.arange(size),
        "images": torch.randn(size, 3, image_size, image_size, generator=random),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "word_ids": words,
    }


TINY_VAE: dict[str, Any] = {
    "image_size": 16,
    "num_tokens": 12,
    "codebook_dim": 6,
    "num_layers": 2,
    "num_resnet_blocks": 1,
    "hidden_dim": 8,
}


def tiny_vae(seed: int = 0, **settings: Any) -> VAE:
    """A VAE with 4 x 4 positions and weights large enough for codes to differ."""
    torch.manual_seed(seed)
    model = VAE(**{**TINY_VAE, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
