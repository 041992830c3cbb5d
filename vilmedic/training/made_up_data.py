"""Synthetic data with the shapes of a configured data set, for `--plan`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vilmedic.config import build
from vilmedic.config.load import Config
from vilmedic.datasets.aligned import IMAGE_TOKENS, AlignedDataset, SampleKey
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.label import LABELS_FILE, find_labels
from vilmedic.errors import ConfigError, DataError
from vilmedic.registry import DATASETS

WORDS = 2000
"""Size of a vocabulary that training would learn from the reports."""
LABELS = 14
"""Labels of a data set that is not there."""
LINES = 8
PIXELS = 512
"""Side of images that are neither resized nor cropped."""
SINGLE = {"ImageDataset": "image", "TextDataset": "seq", "LabelDataset": "label"}


def make_up_data(config: Config, folder: Path) -> tuple[AlignedDataset, list[str]]:
    """Write a few samples, each as long as it can be, and read them as training would.

    Args:
        config: the configuration; of its data only the label files are read, if there are any.
        folder: where to write.

    Returns:
        The data set, and what had to be assumed, a line each.

    Raises:
        ConfigError: the data set is not one of this package, or its tokenizer cannot be loaded.
    """
    node = copy.deepcopy(dict(config.dataset))
    proto = node["proto"]
    single = SINGLE.get(proto)
    parts = {single: node} if single else {key: node[key] for key in SINGLE.values() if key in node}
    if not parts:
        raise ConfigError(f"dataset.proto: --plan knows no '{proto}'. Allowed: those of vilmedic.")
    if proto == "ImSeqShards":
        node["proto"] = "ImSeqLabel" if "label" in node else "ImSeq"
        node.pop("mixed", None)
    for key in ("fraction", "ids"):
        node.pop(key, None)
    assumed, lines = [], LINES
    if "label" in parts:
        names, of_labels = _label_names(parts["label"], config.run_dir)
        lines = max(LINES, len(names))  # each label is in one
        _write(folder, "label", [names[number % len(names)] for number in range(lines)])
        parts["label"] |= {"root": str(folder), "file": "label.tok"}
    if "image" in parts:
        assumed += _write_images(parts["image"], folder, lines)
    if "seq" in parts:
        assumed += _write_reports(parts["seq"], folder, lines)
    if "label" in parts:
        assumed += of_labels
    runtime = {"split": "train", "training": True, "seed": 0, "run_dir": folder / "run"}
    (folder / "run").mkdir()
    known = {name: value for name, value in runtime.items() if name in DATASETS.runtime}
    return build(DATASETS, node, **known), assumed


def make_batch(data: AlignedDataset, size: int, image_tokens: int | None) -> dict[str, Any]:
    """A batch of any size, as the loader gives it.

    Args:
        data: what `make_up_data` gave.
        size: samples.
        image_tokens: tokens of an image, where the data set caches these.
    """
    for part in data.parts:
        if isinstance(part, ImageDataset) and part.tokens == "cache" and image_tokens:
            part.rows = (IMAGE_TOKENS, lambda line: torch.zeros(image_tokens, dtype=torch.int64))
    few = data.collate([data[SampleKey(number)] for number in range(min(size, LINES))])
    return {key: _repeated(value, size) for key, value in few.items()}


def _repeated(value: Any, size: int) -> Any:
    if isinstance(value, Tensor):
        # images need no memory of their own: they are shapes only
        if value.ndim > 2:
            return value[:1].expand(size, *value.shape[1:])
        return value[torch.arange(size) % len(value)]
    return [value[number % len(value)] for number in range(size)]


def _write(folder: Path, kind: str, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    (folder / f"train.{kind}.tok").write_text(text, encoding="utf-8")


def _label_names(part: dict[str, Any], run_dir: Path) -> tuple[list[str], list[str]]:
    """Return the labels of the data set, and what is assumed where it is not there.

    Whether a sample has several is set in `part`.
    """
    root, file = str(part.get("root")), part.get("file", "label.tok")
    try:
        names, several = find_labels(root, file, run_dir / LABELS_FILE)
    except (DataError, OSError):  # found and reported when training starts
        names, several = [], False
    if not names:
        made_up = [f"label {number}" for number in range(LABELS)]
        return made_up, [f"{LABELS} labels, as {root} has no file of them"]
    if part.get("multi_label") is None:
        part["multi_label"] = several
    return names, []


def _write_images(part: dict[str, Any], folder: Path, lines: int) -> list[str]:
    resize, crop = part.get("resize", 256), part.get("crop", 224)
    side = resize or max(PIXELS, crop or 0)
    Image.new("L", (side, side)).save(folder / "image.png")
    several = ",".join(["image.png"] * part.get("multi_image", 1))
    _write(folder, "image", [several] * lines)
    for key in ("image_path", "ext", "cache", "spool"):
        part.pop(key, None)
    part |= {"root": str(folder), "file": "image.tok"}
    return [] if resize or crop else [f"images of {PIXELS} x {PIXELS} pixels"]


def _write_reports(part: dict[str, Any], folder: Path, number: int) -> list[str]:
    longest = part.get("tokenizer_max_len", 128)
    length = max(longest, WORDS // LINES)
    words = [_word(number) for number in range(WORDS)]
    lines = [
        " ".join(words[(line * length + place) % WORDS] for place in range(length))
        for line in range(number)
    ]
    _write(folder, "report", lines)
    part |= {"root": str(folder), "file": "report.tok"}
    part |= {"sample_sentence": False, "shuffle_sentences": False}
    part.pop("max_sentences", None)
    assumed = [f"reports of {longest} tokens, the longest there can be"]
    if part.get("tokenizer") is None:
        part["vocab_min_frequency"] = 1
        assumed.append(f"a vocabulary of {WORDS:,} words, as it is learned from the reports")
    return assumed


def _word(number: int) -> str:
    """A word of letters only, which cleaning leaves as it is."""
    letters = ""
    for _ in range(3):
        number, rest = divmod(number, 26)
        letters += chr(ord("a") + rest)
    return f"word{letters}"
