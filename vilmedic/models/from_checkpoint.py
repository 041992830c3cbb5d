"""Models rebuilt from a checkpoint alone, without data, hub or configuration file."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from vilmedic.blocks.pretrained import Filled
from vilmedic.checkpoints.adapters import without_adapters
from vilmedic.checkpoints.checkpoint import load_checkpoint, load_weights
from vilmedic.checkpoints.exported import SAID
from vilmedic.config import build
from vilmedic.config.declared import IMAGES, REPORTS
from vilmedic.config.keys import OF_INPUTS, check_older, find_older
from vilmedic.config.load import check_arguments
from vilmedic.config.trained import data_parts
from vilmedic.config.tree import KeyPath, dotted
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.label import saved_labels
from vilmedic.datasets.text import ReportTokens, TextDataset, load_tokenizer
from vilmedic.datasets.transforms import Pixels
from vilmedic.datasets.vocabulary import read_word_list, run_vocabulary, word_list
from vilmedic.errors import CheckpointError, ConfigError, DataError
from vilmedic.models.contract import Model
from vilmedic.registry import MODELS


@dataclass(frozen=True)
class Loaded:
    """A model with its preprocessing of images and reports, as in its evaluation.

    Args:
        model: the model, on the CPU.
        config: the configuration that it was trained with.
        spec: its tokenizer and label names.
        pixels: the image preprocessing; None for data without images.
        reports: the report preprocessing; None for data without reports.
        path: the checkpoint.
        ema: whether its weights are averages over training.
        header: what the checkpoint says of itself: epoch, step, seed, and its score with the
            metric and what is better of it; of an exported folder, as `export`, what it tells of
            its run.
    """

    model: Model
    config: Mapping[str, Any]
    spec: DataSpec
    pixels: Pixels | None
    reports: ReportTokens | None
    path: Path
    ema: bool = False
    header: Mapping[str, Any] = field(default_factory=dict)


def from_checkpoint(
    path: Path, *, ema: bool = False, config: Mapping[str, Any] | None = None
) -> Loaded:
    """Build the model of a checkpoint and fill it.

    Args:
        path: the file.
        ema: take the averaged weights.
        config: the configuration, for a checkpoint that holds none that can be used.

    Raises:
        CheckpointError: the file is missing or damaged, or lacks what a model needs.
        ConfigError: a configuration is given for a checkpoint that holds its own.
    """
    state = without_adapters(load_checkpoint(path), path)
    settings = _settings(state.get("config") or {}, config, path)
    node = copy.deepcopy(settings["model"])
    if isinstance(node.get("vae"), dict) and settings is not config:
        node["vae"]["ckpt"] = str(path)  # a checkpoint of DALLE holds its VAE
    nodes = {cls: one for cls, (_, one) in data_parts(settings["dataset"])}
    image, text = nodes.get(IMAGES), nodes.get(REPORTS)
    spec = _spec(state, text, path)
    filled = Filled(state.get("networks") or {})
    model: Model = build(MODELS, node, spec=spec, filled=filled)
    load_weights(model, state, path, ema=ema)
    step = (state.get("progress") or {}).get("step")
    if step:
        model.schedule(step)
    exported = state.get("export")
    reports = None
    if text is not None and spec.tokenizer is not None:
        longest = spec.tokenizer_max_len or 0
        try:
            reports = ReportTokens(spec.tokenizer, longest, text.get("processing"))
        except ValueError as error:
            raise CheckpointError(f"{path}: describes impossible reports: {error}") from None
    return Loaded(
        model=model.eval(),
        config=settings,
        spec=spec,
        pixels=None if image is None else _pixels(image, model, path),
        reports=reports,
        path=path,
        ema=ema or bool(exported and exported["source"].get("ema")),
        header={**{name: state.get(name) for name in SAID}, "step": step, "export": exported},
    )


def _settings(
    own: Mapping[str, Any], given: Mapping[str, Any] | None, path: Path
) -> Mapping[str, Any]:
    """The configuration of a checkpoint: its own, or the one that is given for it.

    Raises:
        CheckpointError: it has none that can be used, and none is given.
        ConfigError: one is given, and it has its own.
    """
    for section in ("model", "dataset"):
        if not isinstance(own.get(section, {}), Mapping):
            raise CheckpointError(f"{path}: is damaged: its section '{section}' is no section.")
    if "model" not in own or "dataset" not in own:
        lacks = "holds weights without the configuration of its run, so the model cannot be built"
    elif problems := [*_older_keys(own["dataset"], ("dataset",))]:
        lacks = f"says in older keys what the model is shown: {'; '.join(problems)}"
    elif given is not None:
        raise ConfigError(f"config: {path} holds its configuration. Leave config out.")
    else:
        return own
    if given is None:
        raise CheckpointError(
            f"{path}: {lacks}. Name the configuration as well (config=...), or give a checkpoint "
            "that bin/train.py wrote."
        )
    return given


def _older_keys(node: Mapping[str, Any], path: KeyPath) -> Iterator[str]:
    """Unknown settings of older projects for images and texts."""
    for name, value in node.items():
        where = (*path, name)
        if isinstance(value, Mapping):
            yield from _older_keys(value, where)
        elif name in OF_INPUTS and (older := find_older(where)) is not None:
            yield f"{dotted(where)}: {check_older(older, value, where)[1]}"


def _pixels(node: Mapping[str, Any], model: Model, path: Path) -> Pixels:
    """Return the image preprocessing of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or not what the model works with.
    """
    wanted = inspect.signature(Pixels).parameters
    given = {name: value for name, value in node.items() if name in wanted}
    try:
        check_arguments(ImageDataset, {"root": "", **given})
        pixels = Pixels.of_evaluation(ImageDataset, node)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{path}: describes impossible images: {error}") from None
    for option, allowed in model.image_options.items():
        found = getattr(pixels, option, allowed[0])
        if found not in allowed:
            raise CheckpointError(
                f"{path}: its configuration has {option}={found} for images, but "
                f"{type(model).__name__} works with {' or '.join(map(str, allowed))} only. Name a "
                "configuration that says so (config=...)."
            )
    return pixels


def _spec(state: Mapping[str, Any], text: Mapping[str, Any] | None, path: Path) -> DataSpec:
    """Return the data properties of the model, from the checkpoint or its run directory.

    Raises:
        CheckpointError: it is damaged or nowhere to be found.
    """
    if saved := state.get("data"):
        try:
            return DataSpec.from_plain(saved)
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path}: is damaged: {error}.") from None
    labels, several = saved_labels(path.parent)
    if text is None:
        return DataSpec(labels=labels, multi_label=several)
    longest = inspect.signature(TextDataset).parameters["tokenizer_max_len"].default
    tokenizer, filler = _tokenizer(text.get("tokenizer"), path)
    return DataSpec(
        tokenizer=tokenizer,
        tokenizer_max_len=text.get("tokenizer_max_len", longest),
        labels=labels,
        multi_label=several,
        filler=filler,
    )


def _tokenizer(name: str | None, path: Path) -> tuple[PreTrainedTokenizerFast, int | None]:
    """The tokenizer of a checkpoint that does not hold it, and its filler if it has one.

    Raises:
        CheckpointError: it is not beside the checkpoint and not where the configuration says.
    """
    words = word_list(name, path.parent)
    try:
        if words is not None:
            tokenizer = read_word_list(words)
            return tokenizer, tokenizer.pad_token_id
        if name is not None:
            return load_tokenizer(name), None
        return run_vocabulary(path.parent, None, processing=None, min_frequency=1), None
    except (ValueError, DataError) as error:
        raise CheckpointError(
            f"{path}: was saved without its vocabulary, which is not to be found either: {error} "
            "Keep the checkpoint in its run directory, whose folder 'tokenizer' holds the "
            "vocabulary."
        ) from None
