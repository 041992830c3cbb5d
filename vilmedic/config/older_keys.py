"""Keys of published configurations that this project spells otherwise or does not have.

They come from the original vilmedic. A key without effect on the result is left out with a line;
for any other the message says what to write instead. `docs/migrating.md` lists them all.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from vilmedic.config.marks import KeyPath, dotted
from vilmedic.config.wording import spell

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True)
class OlderKey:
    """A key of published configurations.

    Args:
        section: the top-level section that it stands in, at any depth.
        name: the key.
        instead: what is done or to be written; `{section}` is where the key stands.
        accepted: the values that have no effect on the result; None for any.
        note: why such a value is left out, where `instead` does not say it.
        always: whether it is also meant where any key is allowed, in the settings of a model whose
            configuration cannot be read.
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
"""Keys of a data set without which a model is shown something else."""

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
)
_BY_NAME = {(one.section, one.name): one for one in OLDER_KEYS}


def find_older(path: KeyPath, *, open_ended: bool = False) -> OlderKey | None:
    """What is known of a key that the schema does not have.

    Args:
        path: the key.
        open_ended: whether any key is allowed where it stands.
    """
    found = _BY_NAME.get((str(path[0]), str(path[-1])))
    return None if found is None or (open_ended and not found.always) else found


def judge_older(older: OlderKey, value: Any, path: KeyPath) -> tuple[bool, str]:
    """Whether a value is accepted, and the sentence that says so or what to write.

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
    """What to write instead of a custom transform."""
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
    """The lines that say the same as a published transform, as far as its text shows."""
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
