"""Encoder weights from the checkpoint of another run or from a plain state dict."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vilmedic.blocks.pretrained import POOLER
from vilmedic.checkpoints import checkpoint
from vilmedic.checkpoints.adapters import without_adapters
from vilmedic.checkpoints.older_formats import older_names, original_names, zoo_file
from vilmedic.config.declared import REPORTS
from vilmedic.config.trained import VOCABULARY, data_parts
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.text import load_tokenizer
from vilmedic.errors import ArgumentError, CheckpointError
from vilmedic.manifest import WEIGHTS, exported_part, is_export

log = logging.getLogger(__name__)

PLACES = {"cnn": ("cnn.network.",), "encoder": ("encoder.network.", "encoder.text.network.")}
"""Prefixes of an encoder's weight names in the systems that have one."""
WHAT = {"cnn": "image encoder", "encoder": "text encoder"}
HOLDERS = {"cnn": "ConVIRT, GLoRIA, SimCLR or Classifier", "encoder": "ConVIRT or GLoRIA"}
FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "layer_norm_eps", "max_position_embeddings"),
    *("vocab_size", "image_size", "patch_size", "num_channels"),
)
"""Fields of a transformers configuration that change what the same weights compute.
"""


@dataclass(frozen=True)
class EncoderFile:
    """An encoder in a file.

    Args:
        key: the configuration key that names the file, for messages.
        part: `cnn` or `encoder`.
        path: the file.
        weights: under the names of the network.
        state: the other contents of the file.
        of_run: whether it is the checkpoint of a system rather than a state dict of the network.
    """

    key: str
    part: str
    path: Path
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]
    of_run: bool

    @property
    def node(self) -> Mapping[str, Any]:
        """The section of the encoder in the configuration of its run."""
        node = _model(self.state).get(self.part)
        return node if isinstance(node, Mapping) else {}

    @property
    def config(self) -> Mapping[str, Any]:
        """The transformers configuration of the network; empty for one of torchvision."""
        networks = self.state.get("networks") or {}
        places = [place.rstrip(".") for place in PLACES[self.part]]
        return next((networks[place] for place in places if place in networks), {})

    def has(self, beginning: str) -> bool:
        """Whether it has weights whose names begin so."""
        return any(name.startswith(beginning) for name in self.weights)

    def fill(
        self, network: nn.Module, *, cut: Collection[str] = (), head: str | None = None
    ) -> None:
        """Load the weights into a network.

        The file must hold all weights of the network and no others. The pooler of a transformers
        model is left out, or starts at random values, if only one side has it.

        Args:
            network: the network to fill.
            cut: names of weights that were removed from the network, which the file may hold.
            head: name of the classifier, which may be missing or of another size.

        Raises:
            ConfigError: listing how names, shapes or settings differ.
        """
        own = network.state_dict()
        given = dict(self.weights)
        if head is not None:
            own, given = (
                {name: value for name, value in one.items() if not name.startswith(f"{head}.")}
                for one in (own, given)
            )
        missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        extra = [name for name in extra if name not in cut]
        if isinstance(network, PreTrainedModel) and self.of_run:
            fresh = [name for name in missing if name.startswith(POOLER)]
            missing = [name for name in missing if name not in fresh]
            extra = [name for name in extra if not name.startswith(POOLER)]
            if fresh:
                log.warning(
                    "%s has no weights for %s; they start at random values, and stay so where they "
                    "are frozen.",
                    self.path,
                    ", ".join(fresh),
                )
        both = sorted(own.keys() & given.keys())
        shapes = [name for name in both if own[name].shape != given[name].shape]
        problems = [
            f"{len(names)} {what}, such as '{names[0]}'"
            for names, what in (
                (missing, "tensors are missing"),
                (extra, "tensors are unknown"),
                (shapes, "tensors have another shape"),
            )
            if names
        ]
        if shapes:
            sizes = tuple(given[shapes[0]].shape), tuple(own[shapes[0]].shape)
            problems[-1] += f", which is {sizes[0]} in it and {sizes[1]} here"
        settings = _other_settings(self, network)
        if problems or settings:
            what = WHAT[self.part] if self.part != "cnn" else "backbone"
            listed = "; ".join([*settings, *problems])
            raise ArgumentError({self.key: f"{self.path} does not fit the {what}: {listed}."})
        whole = network.state_dict()  # with the versions that some networks need
        whole.update({name: given[name] for name in both})
        network.load_state_dict(whole)

    def check_vocabulary(self, spec: DataSpec) -> None:
        """Refuse a text encoder with another vocabulary than that of this run.

        Raises:
            ConfigError: the vocabularies differ, or that of the file is damaged.
        """
        assert spec.tokenizer is not None
        trained = _vocabulary(self)
        if trained is None:
            log.warning(
                "%s does not hold its vocabulary, so it cannot be compared with that of this run.",
                self.path,
            )
            return
        own = spec.tokenizer.get_vocab()
        if trained == own:
            return
        other = sum(own.get(word) != number for word, number in trained.items())
        raise ArgumentError(
            {
                self.key: f"{self.path} was trained with another vocabulary: of its {len(trained)} "
                f"words {other} are missing in that of this run, which has {len(own)}, or have "
                f"another number. Set tokenizer={_tokenizer_of(self)}."
            }
        )


def read_encoder(key: str, name: str, part: str, network: nn.Module) -> EncoderFile:
    """Find and read the weights of an encoder.

    Args:
        key: the argument that gives the name.
        name: a run directory, whose best checkpoint is taken; an exported folder, or the folder of
            an encoder in one; a checkpoint, of an older project too; or a file with a state dict of
            the network.
        part: `cnn` or `encoder`.
        network: the whole network, for the names of its layers.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it holds no such encoder.
    """
    try:
        path = _find(key, name)
        state = without_adapters(checkpoint.load_checkpoint(path), path)
    except CheckpointError as error:
        raise ArgumentError({key: str(error)}) from error
    holder = nn.Module()
    for place in PLACES:
        holder.add_module(place, nn.ModuleDict({"network": network}))
    bare = original_names(older_names(state["model"], ()), holder, text="encoder.network.")
    for place in PLACES[part]:
        found = {n.removeprefix(place): v for n, v in bare.items() if n.startswith(place)}
        if found:
            return EncoderFile(key, part, path, found, state, of_run=True)
    if "progress" in state or "proto" in _model(state):
        system = _model(state).get("proto", "another system")
        raise ArgumentError(
            {
                key: f"{path} holds no {WHAT[part]}: it is a checkpoint of {system}. Allowed: a "
                f"run directory or a checkpoint of {HOLDERS[part]}, or a file with a state dict "
                "of the network."
            }
        )
    return EncoderFile(key, part, path, bare, state, of_run=False)


def _find(key: str, name: str) -> Path:
    """The file of a name, the best checkpoint of a run directory."""
    path = Path(name)
    if (inside := zoo_file(path)) is not None:
        return inside
    if is_export(path):
        return path
    if (path / WEIGHTS).is_file():
        return Path(exported_part(name, path.name)) / WEIGHTS
    if not path.is_dir():
        if not path.exists():
            raise ArgumentError(
                {
                    key: f"there is no file {path.absolute()}. Allowed: a run directory, a "
                    "checkpoint, an exported folder or a file with a state dict of the network."
                }
            )
        return path
    there = sorted(one.name for one in path.glob("*.pth"))
    if len(there) == 1:
        return path / there[0]
    if there and not checkpoint.scored(path):
        listed = ", ".join(there)
        raise ArgumentError(
            {key: f"{path} holds no checkpoint with a score. Name the file: {listed}."}
        )
    return checkpoint.find_checkpoints(path, "best-1", remedy="Name the file to use")[0]


def _model(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section of the model in the configuration of a checkpoint."""
    node = (state.get("config") or {}).get("model")
    return node if isinstance(node, Mapping) else {}


def _other_settings(file: EncoderFile, network: nn.Module) -> list[str]:
    """Return the settings in which the network of a file differs."""
    if not isinstance(network, PreTrainedModel):
        return []
    own = network.config.to_dict()
    return [
        f"{name} is {file.config[name]} in it and {own[name]} here"
        for name in FIELDS
        if name in file.config and name in own and file.config[name] != own[name]
    ]


def _reports(file: EncoderFile) -> Mapping[str, Any]:
    """Return the report section in the configuration of a run."""
    dataset = (file.state.get("config") or {}).get("dataset")
    parts = dict(data_parts(dataset)) if isinstance(dataset, dict) else {}
    return parts[REPORTS][1] if REPORTS in parts else {}


def _vocabulary(file: EncoderFile) -> dict[str, int] | None:
    """Return the vocabulary of a text encoder; None if unknown.

    Raises:
        ConfigError: they are damaged.
    """
    folder = _vocabulary_beside(file)
    try:
        if saved := file.state.get("data"):
            tokenizer = DataSpec.from_plain(saved).tokenizer
        else:
            tokenizer = load_tokenizer(str(folder)) if folder.is_dir() else None
    except (ValueError, LookupError, TypeError) as error:
        raise ArgumentError({file.key: f"{file.path} is damaged: {error}."}) from None
    return None if tokenizer is None else tokenizer.get_vocab()


def _vocabulary_beside(file: EncoderFile) -> Path:
    """Return the folder that may hold the vocabulary of a file: of its run or of an export."""
    folder = file.path.parent
    return folder if (folder / "tokenizer.json").is_file() else folder / VOCABULARY


def _tokenizer_of(file: EncoderFile) -> str:
    """Return the `tokenizer` value for the vocabulary of a file."""
    folder = _vocabulary_beside(file)
    if is_export(file.path):
        return str(file.path)
    if name := _reports(file).get("tokenizer"):
        return str(name)
    if folder.is_dir():
        return str(folder)
    save = f"vilmedic.load('{file.path}').spec.tokenizer.save_pretrained(folder)"
    return f"<folder>, which {save} writes"
