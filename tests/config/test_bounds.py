"""Every numeric key of the schema with extreme and non-finite values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from tests.made_up_evaluations import evaluation, random, split_features
from tests.metrics.test_reconstruction import evaluation as vae_evaluation
from tests.post_processing.test_plot_attention import gloria_evaluation
from tests.small_dalles import dalle_batch, save_vae, tiny_dalle
from tests.small_models import (
    TINY_BERT,
    TINY_VAE,
    tiny_batch,
    tiny_cnn,
    tiny_encoder,
    tiny_gloria,
    tiny_spec,
    tiny_vae,
)
from vilmedic.blocks.text import TextEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.check import Checker
from vilmedic.config.declared import GROUP_OPTIONS
from vilmedic.config.load import ROOT
from vilmedic.config.namespaces import names, signature
from vilmedic.config.sections import GenerationSection, TrainorSection
from vilmedic.config.signature import Param, Signature, read_signature
from vilmedic.config.transformers_fields import config_signature
from vilmedic.config.tree import Tree
from vilmedic.config.types import (
    ANY,
    NUMBERS,
    AnyOf,
    Basic,
    Lengths,
    ListOf,
    MapOf,
    Marked,
    TupleOf,
    Type,
    instance_of,
    options,
    plain,
)
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.transforms import build_transforms, try_transforms
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.generation.sampling import Sampling, generate_tokens
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.metrics import pointing_game
from vilmedic.metrics.prompted_findings import PromptedFindings
from vilmedic.models.classifier import Classifier
from vilmedic.models.vae import VAE, load_vae
from vilmedic.post_processing.plot_attention import PlotAttention
from vilmedic.registry import LOSSES, METRICS, REGISTRIES
from vilmedic.training.averaged_weights import AveragedWeights
from vilmedic.training.optimization import make_optimizer, named_class

NEVER = (math.nan, math.inf, -math.inf, 2**70, 2.0**70)
OFTEN = (-1, 0)
FOREIGN = ("torch.optim", "torch.optim.lr_scheduler", "torchvision.transforms.v2")
MODELS = ("bert", "roberta", "distilbert", "vit")


@cache
def owners() -> dict[str, Signature]:
    """Everything whose arguments a configuration can set, by dotted path."""
    found: dict[str, Signature] = {}

    def walk(path: str) -> None:
        read = read_signature(path)
        if read is None or path in found:
            return
        found[path] = read
        for param in read.settable.values():
            instance = instance_of(param.type)
            if instance is not None:
                walk(instance.path)

    walk(ROOT)
    for registry in REGISTRIES.values():
        for place in registry.locations():
            if place.startswith("vilmedic."):
                walk(place.replace(":", "."))
    for namespace in FOREIGN:
        for name in names(namespace):
            read = signature(namespace, name)
            if read is not None:
                found[f"{namespace}.{name}"] = read
    for model_type in MODELS:
        read = config_signature(model_type)
        assert read is not None
        found[f"transformers.{model_type}"] = read
    return found


def shapes(kind: Type, number: float) -> Iterator[Any]:
    """A number in every form that a type accepts."""
    if isinstance(kind, Marked):
        if isinstance(kind.mark, Lengths):
            item = plain(kind)
            assert isinstance(item, ListOf)
            for length in kind.mark.allowed:
                yield from ([one] * length for one in shapes(item.item, number))
        else:
            yield from shapes(kind.base, number)
    elif isinstance(kind, AnyOf):
        for option in kind.options:
            yield from shapes(option, number)
    elif isinstance(kind, ListOf):
        yield from ([one] for one in shapes(kind.item, number))
    elif isinstance(kind, TupleOf):
        yield from map(list, zip(*(shapes(item, number) for item in kind.items), strict=False))
    elif isinstance(kind, MapOf):
        yield from ({"key": one} for one in shapes(kind.value, number))
    elif kind in (*NUMBERS, ANY, Basic("foreign")):
        yield number


def checked(read: Signature, param: Param, value: Any) -> tuple[Any, list[str]]:
    """The converted value and the problems with it."""
    checker = Checker(Tree())
    siblings = {param.name: value}
    if param.name == "mean" and isinstance(value, list):
        siblings["std"] = [1] * len(value)
    result = checker.value(param.type, value, ("section", param.name), read, siblings)
    return result, checker.problems


def problems(read: Signature, param: Param, value: Any) -> list[str]:
    return checked(read, param, value)[1]


def accepted(owner: str) -> list[tuple[str, Any]]:
    """The keys of an owner that accept an extreme value, with that value."""
    read = owners()[owner]
    taken = []
    for param in read.settable.values():
        for number in (*NEVER, *OFTEN):
            for value in shapes(param.type, number):
                result, found = checked(read, param, value)
                if found:
                    assert all(f"section.{param.name}" in problem for problem in found)
                elif (param.name, result) not in taken and not same(result, param.default):
                    taken.append((param.name, result))
    return taken


def same(value: Any, default: Any) -> bool:
    """Whether a value is the default, which the other tests cover."""
    return not isinstance(default, bool) and value == default


def test_every_kind_of_class_is_covered() -> None:
    paths = owners()
    assert len(paths) > 100
    for part in ("TrainorSection", "VAE", "NTXentLoss", "ImageDataset", "Retrieval", "AdamW"):
        assert any(path.endswith(f".{part}") for path in paths), part


@pytest.mark.parametrize("owner", [path for path in owners() if path.startswith("vilmedic.")])
def test_no_key_accepts_non_finite_or_over_64_bit_numbers(owner: str) -> None:
    read = owners()[owner]
    for param in read.settable.values():
        for number in NEVER:
            for value in shapes(param.type, number):
                assert problems(read, param, value), f"{owner}.{param.name}={value}"


@pytest.mark.parametrize("owner", [path for path in owners() if path.startswith("vilmedic.")])
def test_every_number_states_a_bound(owner: str) -> None:
    unbounded = [
        param.name
        for param in owners()[owner].settable.values()
        if any(option in NUMBERS for option in _scalars(param.type))
    ]
    assert unbounded == []


def _scalars(kind: Type) -> Iterator[Type]:
    for option in options(kind):
        if isinstance(option, ListOf):
            yield from _scalars(option.item)
        elif isinstance(option, TupleOf):
            for item in option.items:
                yield from _scalars(item)
        elif isinstance(option, MapOf):
            yield from _scalars(option.value)
        elif isinstance(option, Marked) and not isinstance(plain(option), Basic):
            yield from _scalars(plain(option))
        else:
            yield option


# -- accepted values must be harmless: build the object and run one small step

REFUSED = (ConfigError, CheckpointError)
"""Errors raised before anything is computed: the value is refused, only later."""


def finite(*tensors: Tensor) -> None:
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _pairs_loss(key: str, value: Any, folder: Path, name: str = "") -> None:
    visual = random(4, 8).requires_grad_()
    loss = LOSSES.get(name)(**{key: value})(visual, random(4, 8, seed=1))["loss"]
    loss.backward()
    assert visual.grad is not None
    finite(loss, visual.grad)
    assert visual.grad.abs().sum() > 0


def _classifier(key: str, value: Any, folder: Path) -> None:
    if key == "hidden":
        value = min(value, 4096)  # a layer with 64 Ki x 1024 weights takes 256 MiB
    spec = DataSpec(labels=("A", "B"), multi_label=True)
    model = Classifier(spec=spec, cnn=tiny_cnn(), **{key: value})
    optimizer = make_optimizer(model, TrainorSection())
    assert all(0 < group["lr"] <= 1000 for group in optimizer.param_groups)
    batch = {"images": random(2, 3, 32, 32), "labels": torch.eye(2)}
    loss = model(batch)["loss"]
    loss.backward()
    finite(loss, *(p.grad for p in model.parameters() if p.grad is not None))


def _gloria_loss(key: str, value: Any, folder: Path) -> None:
    model = tiny_gloria(loss=GLoRIALoss(**{key: value}))
    loss = model(tiny_batch())["loss"]
    loss.backward()
    finite(loss, *[p.grad for p in model.parameters() if p.grad is not None])


def _transformer(key: str, value: Any, folder: Path) -> None:
    vae = save_vae(folder / "vae.pth")
    model = tiny_dalle(vae, **{key: value})
    loss = model(dalle_batch())["loss"]
    loss.backward()
    finite(loss)


def _frozen_vae(key: str, value: Any, folder: Path) -> None:
    vae = load_vae(save_vae(folder / "vae.pth"), {key: value})
    finite(vae(tiny_batch(image_size=16))["loss"])


def _vae(key: str, value: Any, folder: Path) -> None:
    model = VAE(**{**TINY_VAE, key: value})
    loss = model(tiny_batch(image_size=16))["loss"]
    loss.backward()
    finite(loss, *[p.grad for p in model.parameters() if p.grad is not None])


def _trainor(key: str, value: Any, folder: Path) -> None:
    """The average equals the last step; the other keys are trained in `end_to_end`."""
    if key == "ema":
        model = nn.Linear(2, 2)
        average = AveragedWeights(model, value)
        model.weight.data.add_(1)
        average.update(1, torch.tensor(True))
        assert torch.allclose(average.state_dict()["weight"], model.weight)
    elif key == "optim_groups":
        number = value["key"]["key"]
        for option in ("lr", "weight_decay"):
            if all(bound.allows(number) for bound in GROUP_OPTIONS[option]):
                model = nn.Linear(2, 2)
                groups = {"weight": {option: number}}
                optimizer = make_optimizer(model, TrainorSection(optim_groups=groups))
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                finite(*model.parameters())
    elif key == "frozen_cache_gib":
        assert value == 0  # end_to_end/test_frozen trains with it
    else:
        assert key in ("epochs", "seed", "num_workers")  # test_the_smallest_numbers_train


def _ensemblor(key: str, value: Any, folder: Path) -> None:
    """Samples images; all tests evaluate with `num_workers=0`."""
    if key != "num_workers":
        given = GenerationSection(**{key: value})
        _drawn(Sampling(filter_thres=given.filter_thres, cond_scale=given.cond_scale), folder)


def _prompted_findings(key: str, value: Any, folder: Path) -> None:
    if key != "bootstrap":
        return _drawn(Sampling(**{key: value}), folder)
    prompts: dict[str, dict[str, str | None]] = {name: {"prompt": name} for name in "ab"}
    metric = PromptedFindings(root="", prompts=prompts, bootstrap=value)
    run: Any = SimpleNamespace(seed=0, name="run", split="test")
    report = metric._report(torch.eye(2), torch.eye(2), run, "images")
    assert report["auroc"] == 1
    assert report["auroc_interval"] is None


def _drawn(sampling: Sampling, folder: Path) -> None:
    model = tiny_dalle(save_vae(folder / "vae.pth"), null_cond_prob=0.5).eval()
    batch = dalle_batch(2)
    numbers = torch.rand(2, 16, dtype=torch.float64)
    tokens = generate_tokens(
        [model], batch["input_ids"], batch["attention_mask"], numbers, sampling
    )
    assert ((tokens >= 0) & (tokens < model.num_image_tokens)).all()


def _pointing_game(key: str, value: Any, folder: Path) -> None:
    report = pointing_game._report([pointing_game._Hit(0, "Mass", 1.0, 1.0, 0.5)], value, seed=0)
    assert report["side"] == 1
    assert "side_interval" not in report


def _reconstruction(key: str, value: Any, folder: Path) -> None:
    numbers = METRICS.get("reconstruction")(**{key: value})(vae_evaluation(tiny_vae()))
    assert all(math.isfinite(number) for number in numbers.values())


def _plot_attention(key: str, value: Any, folder: Path) -> None:
    """Sample 0 is the first line."""
    step = PlotAttention(**{key: value})
    step.check(gloria_evaluation(folder))
    assert [path.name for path in step(gloria_evaluation(folder))] == ["test_attention_0.png"]


def _image_dataset(key: str, value: Any, folder: Path) -> None:
    assert key == "mean"
    mean = torch.tensor([float(number) for number in value])
    finite((torch.rand(3, 2, 2) - mean[:, None, None]) / 0.2)


def _metric(key: str, value: Any, folder: Path, name: str = "") -> None:
    labels = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]] * 5)
    features = {"visual": random(20, 6), "linguistic": random(20, 6, seed=1)}
    features["visual_backbone"] = random(20, 6, seed=2)
    features["logits"] = random(20, 2, seed=4)
    splits = [
        split_features(features, labels, names=("A", "B"), split=split)
        for split in ("test", "train", "validate")
    ]
    options = {key: value}
    if name == "zero_shot":
        prompts = folder / "prompts.yml"
        prompts.write_text("A: {positive: [yes], negative: [no]}\n", encoding="utf-8")
        options["prompts"] = str(prompts)
    given = evaluation(*splits, text=lambda texts: random(len(texts), 6, seed=3))
    result = METRICS.get(name)(**options)(given)
    assert result
    assert not any(isinstance(number, float) and math.isnan(number) for number in result.values())


def _optimizer(key: str, value: Any, folder: Path, name: str = "") -> None:
    weights = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))]
    try:
        optimizer = named_class("torch.optim", name)(weights, **{key: value})
    except (TypeError, ValueError):
        return  # `make_optimizer` refuses these two
    for _ in range(3):
        weights[0].grad, weights[1].grad = torch.full((2, 3), 0.1), torch.zeros(2, 3)
        optimizer.step()
    finite(*weights)


REQUIRED: dict[str, dict[str, Any]] = {
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
    "ExponentialLR": {"gamma": 0.9},
    "MultiStepLR": {"milestones": [2]},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 8},
    "StepLR": {"step_size": 2},
    "WarmupCosineLR": {"total_steps": 8},
}


def _scheduler(key: str, value: Any, folder: Path, name: str = "") -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.5)
    try:
        cls = named_class("torch.optim.lr_scheduler", name)
        schedule = cls(optimizer, **{**REQUIRED.get(name, {}), key: value})
    except (TypeError, ValueError, ZeroDivisionError):
        return  # `Schedule` refuses these
    optimizer.step()
    for _ in range(6):
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        # LinearLR reaches zero up to rounding
        assert -1e-12 <= optimizer.param_groups[0]["lr"] <= 1


NEEDED: dict[str, dict[str, Any]] = {
    "CenterCrop": {"size": 8},
    "Compose": {"transforms": ["RandomInvert"]},
    "FiveCrop": {"size": 8},
    "GaussianBlur": {"kernel_size": 3},
    "JPEG": {"quality": 50},
    "LinearTransformation": {},
    "Pad": {"padding": 1},
    "RandomAdjustSharpness": {"sharpness_factor": 1.0},
    "RandomAffine": {"degrees": 5},
    "RandomApply": {"transforms": ["RandomInvert"]},
    "RandomChoice": {"transforms": ["RandomInvert"]},
    "RandomCrop": {"size": 8},
    "RandomOrder": {"transforms": ["RandomInvert"]},
    "RandomPosterize": {"bits": 4},
    "RandomResize": {"min_size": 8, "max_size": 9},
    "RandomResizedCrop": {"size": 8},
    "RandomRotation": {"degrees": 5},
    "RandomShortestSize": {"min_size": 8},
    "RandomSolarize": {"threshold": 100},
    "Resize": {"size": 8},
    "ScaleJitter": {"target_size": [8, 8]},
    "TenCrop": {"size": 8},
}


def _transform(key: str, value: Any, folder: Path, name: str = "") -> None:
    """Every transform runs once before training; its errors are reported."""
    try:
        made = build_transforms([{name: {**NEEDED.get(name, {}), key: value}}])
        try_transforms(made, 3, 16, None)
    except ValueError:
        return
    assert isinstance(made[0], v2.Transform)


def _language_model(key: str, value: Any, folder: Path, name: str = "") -> None:
    settings: dict[str, Any] = {key: value}
    if name == "roberta":
        config = RobertaConfig(**{**TINY_BERT, "vocab_size": 20})
        RobertaModel(config).save_pretrained(folder)
        settings["proto"] = str(folder)
    elif name == "distilbert":
        small = DistilBertConfig(
            vocab_size=20, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=64
        )
        DistilBertModel(small).save_pretrained(folder)
        settings["proto"] = str(folder)
    pooling = {"pooling": "cls"}
    encoder = tiny_encoder(tiny_spec(), **pooling, **settings) if name == "bert" else None
    if encoder is None:
        encoder = TextEncoder(spec=tiny_spec(), **pooling, **settings)
    batch = tiny_batch()
    finite(encoder(batch["input_ids"], batch["attention_mask"]))


def _backbone(key: str, value: Any, folder: Path) -> None:
    """Arguments that no timm class has are refused with any value."""
    with pytest.raises(ConfigError, match="key"):
        VisionEncoder(backbone="timm/convnext_atto", pretrained=False, **{key: value})


def _vision_model(key: str, value: Any, folder: Path, name: str = "") -> None:
    """An accepted field gives a network with finite features."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = {**small, key: value}
    encoder = VisionEncoder(backbone="hf:vit", pretrained=False, config=config)
    finite(encoder.eval()(random(2, 3, 32, 32)))


Proof = Callable[..., None]
PROOFS: dict[str, Proof] = {
    "vilmedic.config.sections.TrainorSection": _trainor,
    "vilmedic.config.sections.EnsemblorSection": _ensemblor,
    "vilmedic.blocks.vision.VisionEncoder": _backbone,
    "vilmedic.models.classifier.Classifier": _classifier,
    "vilmedic.losses.gloria.GLoRIALoss": _gloria_loss,
    "vilmedic.models.dalle_settings.TransformerSettings": _transformer,
    "vilmedic.models.dalle_settings.FrozenVAE": _frozen_vae,
    "vilmedic.models.vae.VAE": _vae,
    "vilmedic.datasets.image.ImageDataset": _image_dataset,
    "vilmedic.metrics.prompted_findings.PromptedFindings": _prompted_findings,
    "vilmedic.metrics.pointing_game.PointingGame": _pointing_game,
    "vilmedic.metrics.reconstruction.Reconstruction": _reconstruction,
    "vilmedic.post_processing.plot_attention.PlotAttention": _plot_attention,
    **{
        LOSSES.location(name).replace(":", "."): partial(_pairs_loss, name=name)
        for name in ("BarlowTwinsLoss", "ConVIRTLoss", "SigLIPLoss", "VICRegLoss")
    },
    **{
        METRICS.location(name).replace(":", "."): partial(_metric, name=name)
        for name in ("classification", "knn", "linear_probe", "representation", "zero_shot")
    },
}
FAMILIES: dict[str, Proof] = {
    "torch.optim": _optimizer,
    "torch.optim.lr_scheduler": _scheduler,
    "torchvision.transforms.v2": _transform,
    "transformers": _language_model,
}


def proof_of(owner: str) -> Proof | None:
    namespace, _, name = owner.rpartition(".")
    if name == "vit":
        return _vision_model
    return PROOFS.get(owner) or (
        partial(FAMILIES[namespace], name=name) if namespace in FAMILIES else None
    )


@pytest.mark.parametrize("owner", list(owners()))
def test_accepted_values_are_harmless(owner: str, tmp_path: Path) -> None:
    for number, (key, value) in enumerate(accepted(owner)):
        proof = proof_of(owner)
        assert proof is not None, f"{owner}.{key} accepts {value} without a check"
        folder = tmp_path / str(number)
        folder.mkdir()
        with contextlib.suppress(*REFUSED):
            proof(key, value, folder)
