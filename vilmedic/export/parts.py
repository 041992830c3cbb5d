"""Export of encoders, heads, tokenizer and image settings in the formats of other libraries.

- ResNets: a folder of timm, whose weights torchvision takes as well.
- Other networks of torchvision: safetensors under torchvision's names.
- Models of transformers, and tokenizers: what their `save_pretrained` writes.
- VAE and DALLE: safetensors under the names of dalle-pytorch, and the arguments of its classes.
- What is left of a model, its heads: safetensors under the names that they have here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from vilmedic.blocks.pretrained import DESCRIBED
from vilmedic.blocks.text import TextEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.text import quiet
from vilmedic.datasets.transforms import Pixels
from vilmedic.errors import VilmedicError
from vilmedic.files import replace_text
from vilmedic.manifest import (
    DALLE_FOLDER,
    IMAGE_ENCODER,
    TEXT_ENCODER,
    TOKENIZER,
    VAE_FOLDER,
    WEIGHTS,
)
from vilmedic.models.dalle import DALLE
from vilmedic.models.from_checkpoint import Loaded
from vilmedic.models.vae import VAE

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
"""Networks that torchvision and timm call by the same name and that have the same weights."""
HEADS = "heads.safetensors"
PREPROCESSOR = "preprocessor_config.json"
RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Interpolation codes of pillow and transformers."""
SIDE = 224  # of images without a configured size


@dataclass(frozen=True)
class Place:
    """Weights of the model in a file of the export.

    Args:
        file: path in the folder.
        theirs: prefix of the names in the file.
        ours: prefix of the names in the model.
    """

    file: str
    theirs: str
    ours: str


@dataclass(frozen=True)
class Part:
    """A part of the model, with loading instructions for the card.

    Args:
        name: its folder, or its file.
        library: the library that loads it: timm, torchvision, transformers, dalle-pytorch or
            safetensors.
        places: the weights in it.
        said: settings needed to load it.
    """

    name: str
    library: str
    places: list[Place]
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_parts(loaded: Loaded, folder: Path) -> list[Part]:
    """Write all parts of a model.

    Args:
        loaded: the model and what it knows of its data.
        folder: an empty folder.

    Returns:
        The parts, in the order in which a reader meets them.

    Raises:
        VilmedicError: a network cannot be written so that another library loads it.
    """
    model = loaded.model
    parts: list[Part] = []
    if isinstance(model, VAE):
        parts.append(_write_vae(model, "", folder))
    elif isinstance(model, DALLE):
        parts += [_write_vae(model.vae, "vae.", folder), _write_dalle(model, folder)]
    else:
        for name, module in _encoders(model):
            if isinstance(module, VisionEncoder):
                parts.append(_write_image_encoder(name, module, loaded, folder))
            else:
                parts.append(_write_text_encoder(name, module, model, folder))
        parts += _write_heads(model, [place for part in parts for place in part.places], folder)
    if loaded.spec.tokenizer is not None:
        parts.append(_write_tokenizer(loaded.spec, parts, folder))
    if loaded.pixels is not None:
        upsample = getattr(model, "upsample", None)
        _write_json(folder / PREPROCESSOR, preprocessing(loaded.pixels, upsample))
    return parts


def side_of(loaded: Loaded) -> int:
    """Return the image side for trial passes."""
    pixels = loaded.pixels
    return SIDE if pixels is None else pixels.crop or pixels.resize or SIDE


def preprocessing(pixels: Pixels, upsample: int | None) -> dict[str, Any]:
    """Image preprocessing of a model, in the terms of transformers and of this project.

    Args:
        pixels: the image preprocessing of an evaluation.
        upsample: side in pixels to which the model enlarges images itself; None for none.
    """
    mean, std = (values * 3 if len(values) == 1 else values for values in (pixels.mean, pixels.std))
    found: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": pixels.resize is not None,
        "size": {"shortest_edge": pixels.resize or side_or_default(pixels)},
        "resample": RESAMPLE[pixels.interpolation],
        "do_center_crop": pixels.crop is not None,
        "crop_size": dict.fromkeys(("height", "width"), side_or_default(pixels)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": any(mean) or set(std) != {1},
        "image_mean": list(mean),
        "image_std": list(std),
        "color": pixels.color,
        "antialias": True,
    }
    if pixels.own_list:
        found["transforms"] = pixels.own_list
    if upsample is not None:
        size = [upsample, upsample]
        found["upsample"] = {"size": size, "mode": "bilinear", "align_corners": True}
    return found


def side_or_default(pixels: Pixels) -> int:
    """Return the image side: of the settings, or a usual one if images keep their size."""
    return pixels.crop or pixels.resize or SIDE


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module for a file: on the CPU, without shared memory."""
    state = module.state_dict()
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The encoders of a model with their names, images first."""
    for kind in (VisionEncoder, TextEncoder):
        for name, module in model.named_modules():
            if isinstance(module, kind):
                yield name, module


# -- image encoders


def _write_image_encoder(name: str, cnn: VisionEncoder, loaded: Loaded, folder: Path) -> Part:
    place = _folder_of(name, "cnn", IMAGE_ENCODER)
    target = folder / place
    target.mkdir()
    network, ours = cnn.network, f"{name}.network."
    if isinstance(network, PreTrainedModel):
        theirs, unused = _write_transformers(network, target)
        said = _transformers_outputs(cnn, side_of(loaded)) | {"unused": unused}
        return Part(place, "transformers", [Place(f"{place}/{WEIGHTS}", theirs, ours)], said)
    weights = weights_of(network)
    _save(weights, target / WEIGHTS)
    if described := getattr(network, DESCRIBED, None):
        said = _timm_outputs(cnn, described["architecture"], side_of(loaded))
        about = _timm_config(described["architecture"], cnn.out_features, loaded)
        about |= {"model_args": described["arguments"]}
        held = getattr(network, "pretrained_cfg", None) or {}
        about["pretrained_cfg"] |= {k: held.get(k) for k in ("first_conv", "classifier")}
        about.pop("global_pool")
        _write_json(target / "config.json", about)
        return Part(place, "timm", [Place(f"{place}/{WEIGHTS}", "", ours)], said)
    whole, missing = _whole(cnn.backbone, weights)
    classifier = list(dict(whole.named_children()))[-1]
    complete = all(key.startswith(f"{classifier}.") for key in missing)
    features = cnn.out_features
    said = {"architecture": cnn.backbone, "output": cnn.output_layer, "classifier": classifier}
    places = [Place(f"{place}/{WEIGHTS}", "", ours)]
    if cnn.backbone in RESNETS and complete and cnn.output_layer in ("avgpool", "layer4"):
        _write_json(target / "config.json", _timm_config(cnn.backbone, features, loaded))
        return Part(place, "timm", places, said)
    side = getattr(loaded.model, "upsample", None) or side_of(loaded)
    said |= _place_of_features(whole, classifier, cnn, side)
    about = {"library": "torchvision", **said, "num_features": features}
    _write_json(target / "config.json", about)
    return Part(place, "torchvision", places, said)


@torch.inference_mode()
def _transformers_outputs(cnn: VisionEncoder, side: int) -> dict[str, Any]:
    """Return which outputs of a transformers model are the features."""
    options = cnn.source.options((side, side))
    found = cnn.network(_noise(side).to(next(cnn.parameters()).device), **options)
    return {
        "output": cnn.output_layer,
        "interpolate_pos_encoding": "interpolate_pos_encoding" in options,
        "pools": found.get("pooler_output") is not None,
        "maps": found.last_hidden_state.ndim == 4,
    }


def _timm_outputs(cnn: VisionEncoder, architecture: str, side: int) -> dict[str, Any]:
    """Return which outputs of a timm network are the features.

    Raises:
        VilmedicError: they come from an inner layer, after which weights were removed.
    """
    said = {"architecture": architecture, "output": cnn.output_layer}
    if cnn.output_layer == "avgpool":
        return said
    if cnn.output_layer != "forward_features":
        raise VilmedicError(
            f"The image encoder cannot be exported: timm loads whole networks, and {cnn.backbone} "
            f"ends at '{cnn.output_layer}'. Allowed: output_layer avgpool or forward_features."
        )
    with torch.inference_mode():
        found = cnn.network(_noise(side).to(next(cnn.parameters()).device))
    last = getattr(cnn.network, "output_fmt", "NCHW") == "NHWC"
    return said | {"positions": [1] if found.ndim == 3 else [1, 2] if last else [2, 3]}


def _timm_config(architecture: str, features: int, loaded: Loaded) -> dict[str, Any]:
    """Return timm's configuration: the network and its image preprocessing."""
    pixels, side = loaded.pixels, side_of(loaded)
    given: dict[str, Any] = {
        "num_classes": 0,
        "input_size": [3, side, side],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "first_conv": "conv1",
        "classifier": "fc",
    }
    if pixels is not None:
        settings = preprocessing(pixels, None)
        given["interpolation"] = pixels.interpolation
        given |= {"mean": settings["image_mean"], "std": settings["image_std"]}
        given["crop_pct"] = side / (pixels.resize or side)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": features,
        "global_pool": "avg",
        "pretrained_cfg": given,
    }


def _whole(backbone: str, weights: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """Build a torchvision network with the weights; returns also the names without weights.

    Raises:
        VilmedicError: torchvision would not take the weights.
    """
    options = {"init_weights": False} if backbone in ("googlenet", "inception_v3") else {}
    network = models.get_model(backbone, weights=None, **options)
    whole = network.state_dict()
    missing, unexpected = whole.keys() - weights.keys(), sorted(weights.keys() - whole.keys())
    if unexpected:
        raise VilmedicError(
            f"The image encoder cannot be exported: {backbone} of torchvision has no weights named "
            f"{', '.join(unexpected[:3])}."
        )
    whole.update(weights)
    network.load_state_dict(whole)
    return network.eval(), sorted(missing)


@torch.inference_mode()
def _place_of_features(
    whole: nn.Module, classifier: str, cnn: VisionEncoder, side: int
) -> dict[str, Any]:
    """Find the features of an image encoder in a torchvision network, by trial.

    Args:
        whole: the whole network with the weights.
        classifier: its last part.
        cnn: the image encoder.
        side: side in pixels of the trial images.

    Returns:
        `layer`, whose output is averaged over the dimensions `positions`; with `before` its input
        rather than its output; with `rectified` after a ReLU, as DenseNet changes its last features
        in place. No layer if the features are the output without the classifier.

    Raises:
        VilmedicError: they are not found.
    """
    images = _noise(side)
    expected = cnn.pooled(images.to(next(cnn.parameters()).device)).cpu()

    def same(found: Any) -> bool:
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        scale = max(1.0, float(expected.abs().max()))
        return float((found - expected).abs().max()) <= 1e-4 * scale

    kept = whole.get_submodule(classifier)
    setattr(whole, classifier, nn.Identity())
    without = whole(images)
    setattr(whole, classifier, kept)
    if same(without):
        return {"layer": None}
    before = not hasattr(whole, "avgpool") and cnn.output_layer == "avgpool"
    layer = classifier if before else cnn.output_layer
    seen: list[Any] = []
    with whole.get_submodule(layer).register_forward_hook(
        lambda module, given, output: seen.append(given[0] if before else output)
    ):
        whole(images)
    for positions in ([], [2, 3], [1, 2], [1]):
        if isinstance(seen[0], Tensor) and seen[0].ndim == len(positions) + 2:
            for rectified in (False, True):
                found = seen[0].relu() if rectified else seen[0]
                if same(found.mean(dim=positions) if positions else found):
                    said = {"layer": layer, "before": before, "positions": positions}
                    return said | {"rectified": rectified}
    raise VilmedicError(
        f"The image encoder cannot be exported: torchvision's {cnn.backbone} gives other features "
        f"at the layer '{cnn.output_layer}'."
    )


def _noise(side: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, side, side, generator=random)


# -- text encoders and tokenizers


def _write_text_encoder(name: str, encoder: nn.Module, model: nn.Module, folder: Path) -> Part:
    assert isinstance(encoder, TextEncoder)
    place = _folder_of(name.split(".")[0], "encoder", TEXT_ENCODER)
    target = folder / place
    target.mkdir()
    theirs, unused = _write_transformers(encoder.network, target)
    words = model.get_submodule(name.rpartition(".")[0]) if "." in name else None
    said: dict[str, Any] = {"pooling": encoder.pooling, "encoder_of_two": bool(theirs)}
    said["unused"] = unused
    if words is not None and hasattr(words, "last_n_layers"):
        said |= {"pooling": "words", "last_n_layers": words.last_n_layers}
    return Part(
        place,
        "transformers",
        [Place(f"{place}/{WEIGHTS}", theirs, f"{name}.network.")],
        said,
    )


def _write_transformers(network: PreTrainedModel, target: Path) -> tuple[str, list[str]]:
    """Write a model of transformers.

    Of an encoder-decoder only the encoder is trained: its weights get their names in the whole
    model, which then starts its decoder at random.

    Returns:
        The prefix of the weight names in the file, and the modules of the whole model that start at
        random, as they were not trained.

    Raises:
        VilmedicError: transformers would expect other names.
    """
    weights = weights_of(network)
    with torch.device("meta"):
        whole = AutoModel.from_config(network.config, trust_remote_code=False)
    inner = whole if type(whole) is type(network) else whole.get_encoder()
    theirs = next((f"{n}." for n, one in whole.named_modules() if one is inner and n), "")
    if not theirs:
        with quiet():
            network.save_pretrained(target, state_dict=dict(weights))  # a copy, as it is emptied
        if set(load_file(target / WEIGHTS)) != set(weights):
            _save(weights, target / WEIGHTS)
        return "", _first_names(whole.state_dict().keys() - weights.keys())
    if type(inner) is not type(network):
        raise VilmedicError(
            f"The {type(network).__name__} cannot be exported: transformers would load a "
            f"{type(whole).__name__} from its folder, which has no such part."
        )
    named = {theirs + key: value for key, value in weights.items()}
    if "shared.weight" in whole.state_dict():
        table: Any = network.get_input_embeddings()
        named["shared.weight"] = table.weight.detach().cpu().clone()
    whole.config.architectures = [type(whole).__name__]
    whole.config.save_pretrained(target)
    _save(named, target / WEIGHTS)
    others = (key for key in whole.state_dict() if not key.startswith(theirs))
    return theirs, _first_names(set(others) - named.keys())


def _first_names(keys: Iterable[str]) -> list[str]:
    return sorted({key.partition(".")[0] for key in keys})


def _write_tokenizer(spec: DataSpec, parts: list[Part], folder: Path) -> Part:
    """Write the tokenizer, beside the text encoder where there is one."""
    beside = [part.name for part in parts if part.name == TEXT_ENCODER]
    name = beside[0] if beside else TOKENIZER
    # as in a checkpoint: without truncation and padding of the last call
    tokenizer = DataSpec.from_plain(spec.to_plain()).tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    if spec.tokenizer_max_len is not None:
        tokenizer.model_max_length = spec.tokenizer_max_len
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder / name)
    return Part(f"{name}/tokenizer.json", "transformers", [])


# -- heads, VAE and DALLE


def _write_heads(model: nn.Module, places: list[Place], folder: Path) -> list[Part]:
    """Write the weights outside the encoders, if there are any."""
    left = {
        name: value
        for name, value in weights_of(model).items()
        if not any(name.startswith(place.ours) for place in places)
    }
    if not left:
        return []
    _save(left, folder / HEADS)
    return [Part(HEADS, "safetensors", [Place(HEADS, "", "")], {"names": list(left)})]


def _write_vae(vae: VAE, ours: str, folder: Path) -> Part:
    target = folder / VAE_FOLDER
    target.mkdir()
    _save(weights_of(vae), target / WEIGHTS)
    names = (
        *("image_size", "num_tokens", "codebook_dim", "num_layers", "num_resnet_blocks"),
        *("hidden_dim", "channels"),
    )
    said = {name: getattr(vae, name) for name in names}
    said["normalization"] = vae.pixels.mean_and_std
    _write_json(target / "config.json", said)
    return Part(VAE_FOLDER, "dalle-pytorch", [Place(f"{VAE_FOLDER}/{WEIGHTS}", "", ours)], said)


def _write_dalle(model: DALLE, folder: Path) -> Part:
    target = folder / DALLE_FOLDER
    target.mkdir()
    weights = {k: v for k, v in weights_of(model).items() if not k.startswith("vae.")}
    _save(weights, target / WEIGHTS)
    settings = model.settings
    said: dict[str, Any] = {
        "dim": settings.dim,
        "num_text_tokens": model.num_text_tokens - model.text_seq_len,
        "text_seq_len": model.text_seq_len,
    }
    names = (
        *("depth", "heads", "dim_head", "attn_types", "attn_dropout", "ff_dropout"),
        *("loss_img_weight", "share_input_output_emb", "rotary_emb", "shift_tokens"),
    )
    said |= {name: getattr(settings, name) for name in names}
    _write_json(target / "config.json", said)
    return Part(DALLE_FOLDER, "dalle-pytorch", [Place(f"{DALLE_FOLDER}/{WEIGHTS}", "", "")], said)


def _folder_of(name: str, usual: str, folder: str) -> str:
    """Return the folder of an encoder: the usual one, or by its name in a model with others."""
    return folder if name == usual else f"{folder}_{name.replace('.', '_')}"


def _save(weights: dict[str, Tensor], path: Path) -> None:
    save_file(weights, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
