"""Differences between a configuration and the one that a checkpoint was trained with.

An evaluation cannot change the architecture of a trained model, its tokenizer or its image
preprocessing: these come from the checkpoint's configuration. It can change where data and weights
are, which part of the data is read, and the batch size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vilmedic.config.check import Checker
from vilmedic.config.declared import IMAGES, REPORTS
from vilmedic.config.load import Config, read
from vilmedic.config.namespaces import Target, is_node, target
from vilmedic.config.signature import Param, derives_from, read_signature
from vilmedic.config.transformers_fields import (
    HF,
    TIMM,
    backbone_of,
    model_name,
    same_model,
    stated_fields,
)
from vilmedic.config.tree import COMMAND_LINE, KeyPath, Mark, Tree, dotted
from vilmedic.config.types import (
    ANY,
    Basic,
    ConfigOf,
    MapOf,
    Marked,
    NameIn,
    Type,
    instance_of,
    options,
)
from vilmedic.config.wording import shown
from vilmedic.errors import CheckpointError, ConfigError
from vilmedic.manifest import is_export

Keys = dict[str, tuple[str, ...]]

_FROZEN_VAE = "vilmedic.models.dalle_settings.FrozenVAE"
_VIEWS = ("views", "preset", "transforms")
_PARTS: Keys = {
    IMAGES: (
        "resize",
        "interpolation",
        "crop",
        "multi_image",
        "image_choice",
        "color",
        "eval_transforms",
        "mean",
        "std",
    ),
    REPORTS: ("tokenizer", "tokenizer_max_len", "processing"),
}
"""Keys of a data set that determine a model's input in an evaluation."""
_FREE: Keys = {
    "vilmedic.blocks.vision.VisionEncoder": ("pretrained", "lora"),
    "vilmedic.blocks.text.TextEncoder": ("pretrained", "lora"),
    "vilmedic.blocks.text.WordEncoder": ("pretrained", "lora"),
    "vilmedic.models.contract.ContrastiveModel": ("forward_batch_size",),
    "vilmedic.models.classifier.Classifier": ("freeze", "encoder_lr", "head_lr", "layer_decay"),
    "vilmedic.models.dalle_settings.TransformerSettings": ("activation_checkpointing",),
}
"""Keys of a model that do not change the numbers of an evaluation."""
_PLACES: Keys = {
    "vilmedic.blocks.vision.VisionEncoder": ("backbone",),
    "vilmedic.blocks.text.TextEncoder": ("proto",),
    "vilmedic.blocks.text.WordEncoder": ("proto",),
    _FROZEN_VAE: ("ckpt",),
    REPORTS: ("tokenizer",),
}
"""Keys that are paths, which may have changed since training."""
VOCABULARY = "tokenizer"
"""Folder of a run directory with the vocabulary of a run whose `tokenizer` is null."""
PUBLISHED = (("mean", "std"), ("resize", "crop"), ("interpolation",))
"""Keys of images that follow from published weights: of a group either all are taken or none."""


@dataclass(frozen=True)
class Difference:
    """A key that is not as it was in training.

    Args:
        path: where it stands in the configuration of now.
        trained: its value in training, a default included.
        now: its value now, a default included.
        given: whether the configuration of the training gave it.
        place: whether it is only a path.
        node: what was trained instead of another class, with all its keys.
    """

    path: KeyPath
    trained: Any
    now: Any
    given: bool
    place: bool = False
    node: dict[str, Any] | None = None


@dataclass(frozen=True)
class Trained:
    """A configuration in which a checkpoint decides on what it was trained with.

    Args:
        config: the configuration.
        taken: a line for each key whose value is taken from the checkpoint.
        changed: what the command line changes, by dotted key: `checkpoint` and `used`.
    """

    config: Config
    taken: list[str]
    changed: dict[str, dict[str, Any]]


def as_trained(config: Config, saved: Mapping[Path, dict[str, Any]], *, allow: bool) -> Trained:
    """A configuration with the model, the tokenizer and the pixels of checkpoints.

    Args:
        config: what is asked for.
        saved: the configuration in each checkpoint, by its file.
        allow: whether the command line may say otherwise.

    Raises:
        ConfigError: the command line says otherwise and must not; every key is named.
        CheckpointError: the checkpoints are of different models.
    """
    (source, first), *others = saved.items()
    found = [*differences(first, config.data, source.parent), *_vocabulary(first, config, source)]
    commanded = _Commanded(config)
    wrong = [one for one in found if not one.place and commanded(one.path)]
    if wrong and not allow:
        raise ConfigError(
            f"{dotted(one.path)} (command line): given {shown(one.now)}, but {source} was trained "
            f"with {shown(one.trained)}. Leave the key out to evaluate it as it was trained; "
            "ensemblor.changed=allow evaluates it with the given value."
            for one in wrong
        )
    for path, config_of in others:
        for one in differences(first, config_of, path.parent):
            if not one.place and one.path not in [allowed.path for allowed in wrong]:
                raise CheckpointError(
                    f"{path} and {source} cannot be evaluated together: {dotted(one.path)} is "
                    f"{shown(one.now)} in the first and {shown(one.trained)} in the second."
                )
    replaced = [one for one in found if one not in wrong and _counts(one, commanded)]
    taken = [
        f"{dotted(one.path)}: {shown(one.trained)} (the configuration says {shown(one.now)})"
        for one in replaced
    ]
    changed = {dotted(one.path): {"checkpoint": one.trained, "used": one.now} for one in wrong}
    followed = with_values(config, replaced, str(source))
    if (held := _held_vae(followed, source)) is not None and not commanded(held.path):
        followed = with_values(followed, [held], str(source))
        taken.append(
            f"{dotted(held.path)}: {shown(held.trained)} (there is no {shown(held.now)} any more)"
        )
    return Trained(followed, taken, changed)


def differences(saved: dict[str, Any], now: dict[str, Any], run_dir: Path) -> list[Difference]:
    """The keys of model, tokenizer and pixels whose values differ.

    Args:
        saved: the configuration of a training.
        now: another one.
        run_dir: the directory of the training, for its vocabulary.
    """
    found = list(_compare(_kind("model"), saved["model"], now["model"], ("model",)))
    before, after = (dict(data_parts(config["dataset"])) for config in (saved, now))
    for cls, keys in _PARTS.items():
        if cls not in before or cls not in after:
            continue
        (_, old), (path, new) = before[cls], after[cls]
        if cls == IMAGES and all((node.get("views") or 1) > 1 for node in (old, new)):
            keys += _VIEWS  # then evaluations draw views as training does
        inside = _keys(Target(read_signature(cls), cls), old, new, path)
        found += [one for one in inside if one.path[len(path)] in keys]
    return [_classified(one) for one in found if not _own_vocabulary(one, run_dir)]


def _kind(registry: str) -> Type:
    return Marked(MapOf(ANY), NameIn(registry))


def _compare(kind: Type, saved: Any, now: Any, path: KeyPath) -> Iterator[Difference]:
    """Differences in a node that is built into an object."""
    saved, now = saved or {}, now or {}
    try:
        before, after = target(kind, saved), target(kind, now)
    except ConfigError:  # a class that is not there any more
        before = after = Target(None, "")
    if before.path != after.path:
        old, new = saved.get("proto"), now.get("proto")
        yield Difference((*path, "proto"), old, new, given=True, node=saved)
    else:
        yield from _keys(after, saved, now, path)


def _keys(
    found: Target, saved: dict[str, Any], now: dict[str, Any], path: KeyPath
) -> Iterator[Difference]:
    """Return the differences in the arguments of one class."""
    params: dict[str, Param] = {}
    fields: dict[str, Param] = {}
    if found.signature is not None:
        fields = Checker(Tree()).extras(found.signature, {**saved, **now})[0]
        params = {**fields, **found.signature.settable}
    before, after = (_folder_fields(found, node) for node in (saved, now))
    for name in dict.fromkeys([*params, *saved, *now]):
        param = params.get(name, Param(name, ANY, required=False))
        old, new = (
            node.get(name, _default(param, folder if name in fields else None))
            for node, folder in ((saved, before), (now, after))
        )
        named = before is not None or after is not None
        if named and name in fields and name not in saved and name not in now:
            continue  # it belongs to the published model, which is compared as a whole
        chosen = name == "proto" and name not in params  # it chose the class, which is the same
        if chosen or old is new is None or _is(found.path, name, _FREE):
            continue
        word = isinstance(old, str) or isinstance(new, str)  # may stand for a whole section
        if is_node(param.type) and not word and (param.required or None not in (old, new)):
            yield from _compare(param.type, old, new, (*path, name))
        elif _plain(old) != _plain(new):
            place = _is_place(found.path, name, param.type, [old, new])
            yield Difference((*path, name), old, new, name in saved, place)


def _default(param: Param, folder: dict[str, Any] | None) -> Any:
    """Return the default of a key; None if the published model that sets it is not available."""
    if folder is None:
        return param.default
    return folder.get(param.name, param.default) if folder else None


def _folder_fields(found: Target, node: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the published model that a node names; None without one."""
    extras = None if found.signature is None else found.signature.extras
    if not (isinstance(extras, Marked) and isinstance(extras.mark, ConfigOf)):
        return None
    folder = node.get(extras.mark.key)
    return (stated_fields(folder) or {}) if isinstance(folder, str) else None


def data_parts(node: dict[str, Any]) -> Iterator[tuple[str, tuple[KeyPath, dict[str, Any]]]]:
    """The images and the reports of a data set: class, place and keys, the first of each."""
    waiting: list[tuple[Type, dict[str, Any], KeyPath]] = [(_kind("dataset"), node, ("dataset",))]
    seen = set()
    while waiting:
        kind, given, path = waiting.pop(0)
        try:
            found = target(kind, given)
        except ConfigError:
            continue
        cls = next((one for one in _PARTS if derives_from(found.path, one)), None)
        if cls is not None and cls not in seen:
            seen.add(cls)
            yield cls, (path, given)
        for name, param in found.signature.settable.items() if found.signature else ():
            inside = given.get(name)
            if is_node(param.type) and isinstance(inside, dict):
                waiting.append((param.type, inside, (*path, name)))


def _is(path: str, name: str, table: Keys) -> bool:
    return any(name in keys and derives_from(path, cls) for cls, keys in table.items())


def _is_place(path: str, name: str, kind: Type, values: list[Any]) -> bool:
    """Return whether two values of a key both say where something lies."""
    if not all(isinstance(value, str) for value in values):
        return False
    if name == "backbone":  # or the name of a network of torchvision or timm
        return all(map(_is_folder_or_hub, values)) and _is(path, name, _PLACES)
    return _is(path, name, _PLACES) or Basic("path") in options(kind)


def _is_folder_or_hub(backbone: str) -> bool:
    """Return whether a backbone is a published model in a folder or on the hub."""
    name = model_name(backbone)
    if Path(name).is_dir():
        return True
    return "/" in name and (Path(name).is_absolute() or not backbone.startswith(TIMM))


def _plain(value: Any) -> Any:
    """Return a value in which tuples are lists, for comparison."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _own_vocabulary(one: Difference, run_dir: Path) -> bool:
    """Return whether a tokenizer is the path of the run's own vocabulary."""
    made = one.path[-1] == "tokenizer" and one.trained is None and isinstance(one.now, str)
    return made and _alike(run_dir / VOCABULARY, Path(one.now)) is True


def _classified(one: Difference) -> Difference:
    """A difference, which is more than one of places if other words or another model are there."""
    if not one.place:
        return one
    if one.path[-1] == "tokenizer":
        same = _alike(Path(one.trained), Path(one.now))
    else:
        same = same_model(one.trained, one.now)
    return replace(one, place=same is not False)


def _alike(*folders: Path) -> bool | None:
    """Return whether two folders hold the same tokenizer; None when that cannot be seen."""
    try:
        one, other = ((folder / "tokenizer.json").read_bytes() for folder in folders)
    except OSError:
        return None
    return one == other


def _vocabulary(saved: dict[str, Any], config: Config, source: Path) -> list[Difference]:
    """The vocabulary of a checkpoint that lies in the directory of another run, or in an export."""
    if is_export(source):
        after = dict(data_parts(config.data["dataset"])).get(REPORTS)
        if after is None:
            return []
        where = (*after[0], "tokenizer")
        return [Difference(where, str(source), after[1].get("tokenizer"), given=True, place=True)]
    folder = source.parent / VOCABULARY
    if source.parent.resolve() == config.run_dir.resolve() or not folder.is_dir():
        return []
    before, after = (dict(data_parts(one["dataset"])).get(REPORTS) for one in (saved, config.data))
    if before is None or after is None:
        return []
    if before[1].get("tokenizer") is not None or after[1].get("tokenizer") is not None:
        return []
    return [Difference((*after[0], "tokenizer"), str(folder), None, given=True)]


def _held_vae(config: Config, source: Path) -> Difference | None:
    """The frozen VAE as a checkpoint holds it, if there is nothing where it was trained."""
    read, node = target(_kind("model"), config.model).signature, config.model.get("vae")
    if read is None or "vae" not in read.params or not isinstance(node, dict):
        return None
    kind = instance_of(read.params["vae"].type)
    if kind is None or not derives_from(kind.path, _FROZEN_VAE):
        return None
    place = node.get("ckpt")
    if not isinstance(place, str) or Path(place).exists():
        return None
    return Difference(("model", "vae", "ckpt"), str(source), place, given=True, place=True)


class _Commanded:
    """Whether the command line decided on a key."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._files: Tree | None = None

    def __call__(self, path: KeyPath) -> bool:
        config = self._config
        removed = [word[1:].split(".") for word in config.overrides if word.startswith("~")]
        keys = [str(key) for key in path]
        if any(keys[: len(one)] == one for one in removed):
            # without a value of its own, the image follows the published weights of the backbone
            model = config.data.get("model") or {}
            follows = backbone_of(model).startswith((HF, TIMM)) and keys[0] == "dataset"
            return not (follows and any(keys[-1] in group for group in PUBLISHED))
        if config.tree.has(path) and config.tree.origin(path) == COMMAND_LINE:
            return True
        if not config.overrides:
            return False
        # A file may take it from another key, which the command line gives.
        if self._files is None:
            self._files = read(config.path).tree
        both = self._files.has(path) and config.tree.has(path)
        return both and self._files.get(path) != config.tree.get(path)


def _counts(one: Difference, commanded: Callable[[KeyPath], bool]) -> bool:
    """Return whether the checkpoint's value is taken; a path only if it still exists."""
    if not one.place:
        return True
    gone = not Path(model_name(one.trained)).exists() and Path(model_name(one.now)).exists()
    return not gone and not commanded(one.path)


def with_values(config: Config, replaced: list[Difference], origin: str) -> Config:
    """The configuration with the trained values of keys.

    Args:
        config: what was asked for.
        replaced: the keys.
        origin: where the values come from, as messages name it.
    """
    data = copy.deepcopy({key: config.data[key] for key in ("model", "dataset")})
    tree = Tree({**config.tree.data, **data}, dict(config.tree.marks))
    for one in replaced:
        *parents, last = one.path if one.node is None else one.path[:-1]
        node: Any = data
        for key in parents:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        if one.given:
            node[last] = copy.deepcopy(one.trained if one.node is None else one.node)
        else:
            node.pop(last, None)
        where = (*parents, last)
        tree.forget(where)
        tree.marks[where] = Mark(origin)
    run = replace(config.run, **data)
    return replace(config, run=run, data={**config.data, **data}, tree=tree)
