"""Keys without effect, and renamed keys of published configurations.

A key can have no effect because of another one, as declared by the marks `UsedWith`, `Overruled`
and `Within` of its annotation. Keys that this project spells differently or does not have come from
the original vilmedic: a key without effect on the result is left out with a note, for any other the
message gives the replacement. `docs/migrating.md` lists them all.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vilmedic.config.namespaces import signature
from vilmedic.config.signature import Signature
from vilmedic.config.tree import BROKEN, COMMAND_LINE, KeyPath, Tree, dotted
from vilmedic.config.types import (
    AnyOf,
    Marked,
    OptionsOf,
    Overruled,
    Type,
    UsedWith,
    Within,
    spell,
)
from vilmedic.config.wording import shown
from vilmedic.errors import ConfigError

Dependence = UsedWith | Overruled | Within


@dataclass(frozen=True)
class Idle:
    """A key without effect.

    Args:
        path: the key.
        why: the rest of a sentence that begins with the key.
        dropped: whether a stronger layer overrules it, so that it is left out.
    """

    path: KeyPath
    why: str
    dropped: bool


def idle_keys(tree: Tree, read: Signature, given: dict[str, Any], path: KeyPath) -> Iterator[Idle]:
    """Yield the keys of a section that have no effect.

    A key that another one refers to, `${trainor.optim_params.lr}`, has an effect. A default stated
    in a file is no error, nor is a rate that equals the one that overrules it, so that a
    configuration written out in full can be read back.

    Args:
        tree: the values and their marks.
        read: the signature of the section.
        given: the section.
        path: where it stands.
    """
    section = _Section(tree, read, given, path)
    for name, param in read.settable.items():
        for mark in dependences(param.type) if name in given else ():
            found = section.idle(mark, name)
            if found is not None:
                yield found
                break


def dependences(kind: Type) -> list[Dependence]:
    """Return the marks of a type that declare a dependence on another key."""
    if isinstance(kind, AnyOf):
        return [mark for one in kind.options for mark in dependences(one)]
    if not isinstance(kind, Marked):
        return []
    own = [kind.mark] if isinstance(kind.mark, Dependence) else []
    return [*dependences(kind.base), *own]


class _Section:
    def __init__(self, tree: Tree, read: Signature, given: dict[str, Any], path: KeyPath) -> None:
        self.tree = tree
        self.read = read
        self.given = given
        self.path = path

    def idle(self, mark: Dependence, name: str) -> Idle | None:
        if isinstance(mark, Overruled):
            return self.overruled(mark, name)
        value, other = self.given[name], self.value(mark.key)
        if isinstance(mark, Within) and mark.unless and self.value(mark.unless) is not None:
            return None
        if BROKEN in (value, other) or not self.is_idle(mark, value, other):
            return None
        default = self.read.params[name].default
        if value in (None, {}, []) or value == default == "none":
            return None  # sets nothing
        path, key = (*self.path, name), (*self.path, *mark.key.split("."))
        typed = self.is_typed(path)
        if not typed and (value == default or self.is_mode(mark)):
            return None
        if isinstance(mark, Within):
            limit = f"{dotted(key)} is {spell(other)}{self.source(key)}"
            why = f"is beyond the last one: {limit}, and the first is number 0"
        else:
            is_now = f"is {shown(other)}{self.source(key)}"
            why = f"has no effect unless {dotted(key)} {_condition(mark, other)}, and it {is_now}"
        return self.found(path, key, value, why)

    @staticmethod
    def is_mode(mark: Dependence) -> bool:
        return isinstance(mark, UsedWith) and mark.mode

    @staticmethod
    def is_idle(mark: UsedWith | Within, value: Any, other: Any) -> bool:
        if isinstance(mark, Within):
            numbers = all(isinstance(one, int) for one in (value, other))
            return numbers and value > 0 and value >= other
        return other not in mark.values if mark.values else not other

    def overruled(self, mark: Overruled, name: str) -> Idle | None:
        options, other = self.given[name], self.value(mark.by)
        if not isinstance(options, dict) or mark.option not in options:
            return None
        value = options[mark.option]
        if not other or BROKEN in (value, other) or value == other:
            return None
        path = (*self.path, name, mark.option)
        key = (*self.path, *mark.by.split("."))
        stated = self.source(key) if self.tree.has(key) else ", as it is by default"
        instead = mark.instead.format(section=dotted(self.path))
        why = f"has no effect, as {dotted(key)} is {shown(other)}{stated}: {instead}"
        if self.tree.layer(key) is None:
            key = self.chooser(mark.by.partition(".")[0]) or key
        return self.found(path, key, value, why)

    def chooser(self, name: str) -> KeyPath | None:
        """Return the key that names the class whose options a mapping holds."""
        param = self.read.params.get(name)
        for mark in [] if param is None else _options_marks(param.type):
            return (*self.path, mark.key)
        return None

    def found(self, path: KeyPath, key: KeyPath, value: Any, why: str) -> Idle | None:
        name = dotted(path)
        if any(name == one or name.startswith(f"{one}.") for one in self.tree.referred):
            return None
        own, others = self.tree.layer(path), self.tree.layer(key)
        if own is not None and others is not None and own < others:
            return Idle(path, why, dropped=True)
        return Idle(path, f"given {shown(value)}, which {why}.", dropped=False)

    def value(self, key: str) -> Any:
        """Return the value of a sibling key, or of an option of the class it names."""
        first, _, option = key.partition(".")
        param = self.read.params.get(first)
        value = self.given.get(first, param.default if param is not None else None)
        if not option or value is BROKEN:
            return value
        if isinstance(value, dict) and option in value:
            return value[option]
        marks = [] if param is None else _options_marks(param.type)
        for mark in marks:
            chosen = self.value(mark.key)
            try:
                of = signature(mark.namespace, chosen) if isinstance(chosen, str) else None
            except ConfigError:
                continue
            if of is not None and option in of.params:
                return of.params[option].default
        return None

    def is_typed(self, path: KeyPath) -> bool:
        """Return whether the value of a key, or something in it, comes from the command line."""
        return any(
            mark.origin == COMMAND_LINE
            for one, mark in self.tree.marks.items()
            if one[: len(path)] == path
        )

    def source(self, key: KeyPath) -> str:
        found = self.tree.marks.get(key)
        return f" ({found.origin})" if found is not None else ""


def _options_marks(kind: Type) -> list[OptionsOf]:
    if not isinstance(kind, Marked):
        return []
    own = [kind.mark] if isinstance(kind.mark, OptionsOf) else []
    return [*_options_marks(kind.base), *own]


def _condition(mark: UsedWith, other: Any) -> str:
    if mark.values:
        return "is " + " or ".join(spell(value) for value in mark.values)
    return "is true" if isinstance(other, bool) else "is set"


# -- keys of published configurations

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True)
class OlderKey:
    """A key of published configurations.

    Args:
        section: the top-level section that contains it, at any depth.
        name: the key.
        instead: the replacement; `{section}` is the section of the key.
        accepted: the values that have no effect on the result; None for any.
        note: why such a value is left out, if `instead` does not explain it.
        always: whether it also applies where any key is allowed, in the settings of a model
            whose configuration cannot be read.
    """

    section: str
    name: str
    instead: str
    accepted: tuple[Any, ...] | None = ()
    note: str = ""
    always: bool = False


_HUB = "data sets of the hub are not read; data/make_folder.py makes a folder of files"
_BEAMS = "leave it out: it is for systems that write reports, and there is none here"
_ONE = "there is one class for this"
_TRANSFORMS = ("custom_transform_train", "custom_transform_val", "custom_transform_validate")
OF_INPUTS = (*_TRANSFORMS, "max_len", "vocab_file")
"""Keys of a data set that change the input of a model."""

OLDER_KEYS = (
    OlderKey(
        "dataset",
        "load_memory",
        "images are decoded as they are needed; {section}.cache=<folder> keeps the decoded ones",
        accepted=None,
    ),
    *(OlderKey("dataset", name, "") for name in _TRANSFORMS),
    OlderKey("dataset", "num_workers", "write trainor.num_workers and ensemblor.num_workers"),
    OlderKey("dataset", "max_len", "write {section}.tokenizer_max_len"),
    OlderKey("dataset", "vocab_file", "write {section}.tokenizer=<the path of the word list>"),
    OlderKey(
        "dataset",
        "label_file",
        "leave it out: the names are those in the label files, and labels.json of the run keeps "
        "their order",
    ),
    OlderKey("dataset", "source", "reports are read, never written", accepted=("src",)),
    OlderKey("dataset", "show_length", "data/check.py describes the reports", accepted=None),
    *(OlderKey("dataset", f"hf_{name}", _HUB) for name in ("dataset", "field", "local", "filter")),
    OlderKey(
        "model",
        "add_pooling_layer",
        "whether there is a pooler follows from the model and, for ConVIRT, from "
        "{section}.pooling, which is pooler by default",
        accepted=None,
        always=True,
    ),
    OlderKey(
        "model",
        "gradient_checkpointing",
        "write trainor.activation_checkpointing=true",
        accepted=(False,),
        note="it is off unless trainor.activation_checkpointing=true",
        always=True,
    ),
    OlderKey(
        "model",
        "position_embedding_type",
        "positions are absolute in this model, and no others are offered",
        accepted=("absolute",),
    ),
    *(
        OlderKey("model", name, "leave it out: volumes are not read, only images")
        for name in ("slice_encode", "slice_dim")
    ),
    OlderKey("model", "visual_projection", "write model.projection"),
    OlderKey(
        "trainor",
        "use_amp",
        "write trainor.precision=fp16, or bf16, which needs no loss scale",
        accepted=(False,),
        note="trainor.precision is fp32 by default",
    ),
    *(
        OlderKey("trainor", old, f"write trainor.lr_decay_params.{new}")
        for old, new in (
            ("lr_decay_factor", "factor"),
            ("lr_decay_patience", "patience"),
            ("lr_min", "min_lr"),
        )
    ),
    OlderKey("trainor", "proto", _ONE, accepted=("Trainor",)),
    OlderKey("validator", "proto", _ONE, accepted=("Validator",)),
    OlderKey("ensemblor", "proto", _ONE, accepted=("Ensemblor",)),
    OlderKey("validator", "beam_width", _BEAMS),
    OlderKey("ensemblor", "beam_width", _BEAMS),
    OlderKey(  # of `ensemblor: ${validator}`
        "ensemblor", "every", "a trained model is evaluated when it is asked for", accepted=None
    ),
)
_BY_NAME = {(one.section, one.name): one for one in OLDER_KEYS}


def find_older(path: KeyPath, *, open_ended: bool = False) -> OlderKey | None:
    """A renamed or removed key of published configurations, if it is one.

    Args:
        path: the key.
        open_ended: whether any key is allowed where it stands.
    """
    found = _BY_NAME.get((str(path[0]), str(path[-1])))
    return None if found is None or (open_ended and not found.always) else found


def check_older(older: OlderKey, value: Any, path: KeyPath) -> tuple[bool, str]:
    """Return whether a value is accepted, and a message with the reason or the replacement.

    Args:
        older: the key as it was published.
        value: its value.
        path: where it stands.
    """
    section = dotted(path[:-1])
    if older.name in _TRANSFORMS:
        training = older.name == _TRANSFORMS[0]
        return False, _transforms(str(value), section, training=training)
    instead = older.instead.format(section=section)
    if older.accepted is None or value in older.accepted:
        return True, older.note or instead
    if older.accepted and not instead.startswith(("write", "leave")):
        allowed = " or ".join(spell(one) for one in older.accepted)
        return False, f"{instead}. Allowed: {allowed}, or leave it out"
    return False, instead


# -- transforms that were Python code


def _transforms(code: str, section: str, *, training: bool) -> str:
    """Return the replacement of a custom transform."""
    text = "it is Python code, which a configuration never executes. "
    if not training and code.count("Compose(") > 1:
        return f"{text}Leave it out: with two views, evaluation augments as training does"
    if not training:
        return text + (
            f"Leave it out: evaluation resizes to {section}.resize and cuts the middle out, "
            f"{section}.crop; {section}.eval_transforms takes further transforms by name"
        )
    lines = _in_yaml(code)
    if not lines:
        return text + (
            f"Write {section}.resize, crop and preset, or a list of torchvision transforms by name "
            f"as {section}.transforms"
        )
    return f"{text}Write under {section}: {'; '.join(lines)}"


def _in_yaml(code: str) -> list[str]:
    """Return the configuration lines that replace a published transform."""
    try:
        tree = ast.parse(code.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    calls = [(_called(node), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    views = sum(name == "Compose" for name, _ in calls)
    found: dict[str, ast.Call] = {}
    for name, node in calls:
        found.setdefault(name, node)
    if not {"Compose", "ToTensor", "Resize"} & set(found):
        return []
    size, crop = _side(found.get("Resize")), _side(found.get("RandomCrop"))
    middle = _side(found.get("CenterCrop"))
    lines = [f"resize: {size}"] if size else []
    if not (crop or middle) and size:
        crop = size
    lines += [f"crop: {crop or middle}"] if crop or middle else []
    random = [name for name in found if name.startswith("Random") or name == "ColorJitter"]
    if not random:
        lines.append("preset: center_crop")
    elif set(random) == {"RandomCrop", "RandomHorizontalFlip"}:
        lines.append("preset: simclr_xray")
    elif set(random) != {"RandomCrop"}:
        listed = ", ".join(name for name in random if name != "RandomCrop")
        lines.append(f"transforms: a list of {listed}, with the arguments by name")
    if views > 1:
        lines.append(f"views: {views}")
    return lines + _normalization(found.get("Normalize"))


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _literal(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _side(node: ast.Call | None) -> int | None:
    value = _literal(node.args[0]) if node is not None and node.args else None
    value = value[0] if isinstance(value, tuple | list) and value else value
    return value if isinstance(value, int) else None


def _normalization(node: ast.Call | None) -> list[str]:
    if node is None:
        return ["mean: [0]", "std: [1]"]
    values = [_literal(one) for one in node.args[:2]]
    numbers = [list(one) if isinstance(one, tuple | list) else one for one in values]
    if len(numbers) < 2 or tuple(numbers) == IMAGENET:
        return []
    return [f"mean: {numbers[0]}", f"std: {numbers[1]}"]
