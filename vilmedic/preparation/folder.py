"""Training folders: the line files of each split, and a data card of their origin."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vilmedic.datasets.label import UNKNOWN
from vilmedic.datasets.lines import brief, join_names, shown
from vilmedic.errors import DataError
from vilmedic.files import sha256_of
from vilmedic.log import counted
from vilmedic.preparation.splitting import SPLITS, Shares, random_split

CARD = "data_card.json"
Replaced = Literal["all", "images"] | None
LEFT_OUT = "left_out.tsv"
_PLURAL = re.compile(r"\b(?:(row|image|report|file)s|(stud)ies)\b")
VERSION = 3  # raise it when builders write other lines for the same input


@dataclass(frozen=True)
class Sample:
    """One line of each file of a split.

    Attributes:
        images: paths, the first one being what a model of one image sees.
        report: the text, on one line; empty when the data set has none.
        labels: names; none when the data set has none.
        patient: who it is of, so that no patient is in two splits.
    """

    images: tuple[str, ...]
    report: str
    labels: tuple[str, ...]
    patient: str


class Dropped:
    """Left-out samples of a folder, each with its name and reason.

    Attributes:
        rows: path or id, reason and a detail of each, such as where it is named (`t.csv:12`).
        hints: of a reason, what to do about it.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []
        self.hints: dict[str, str] = {}

    def add(self, reason: str, *names: str, where: str = "", hint: str = "") -> None:
        """Leave something out.

        Args:
            reason: a plural that follows a number, such as `rows without a report`.
            names: what is left out; each counts.
            where: file and line that name it, or another detail.
            hint: what to do about it; the first one given for a reason is shown.
        """
        self.rows += [(name, reason, where) for name in names]
        if names and hint:
            self.hints.setdefault(reason, hint)

    def counts(self) -> dict[str, int]:
        """How much was left out, by reason."""
        return dict(sorted(Counter(reason for _, reason, _ in self.rows).items()))

    def summary(self) -> list[str]:
        """A line for each reason: how many, one of them, and what to do about it."""
        first: dict[str, str] = {}
        for name, reason, where in self.rows:
            first.setdefault(reason, " ".join(filter(None, [brief(name), where and f"({where})"])))
        return [
            f"{counted(number, _of_one(reason), reason)}, such as "
            f"{first[reason] or 'one without a name'}."
            f"{' ' + self.hints[reason] if reason in self.hints else ''}"
            for reason, number in self.counts().items()
        ]

    def text(self) -> str:
        """All of it as lines of path, reason and detail, with tabs between them."""
        rows = [("path", "reason", "detail"), *self.rows]
        return "".join("\t".join(_one_line(cell) for cell in row) + "\n" for row in rows)


def _of_one(reason: str) -> str:
    """The reason, a plural, as it reads after 1."""
    singular = _PLURAL.sub(lambda match: match[1] or f"{match[2]}y", reason, count=1)
    if " whose " in reason:
        return singular
    return singular.replace(" that are ", " that is ", 1).replace(" their names", " its name", 1)


@dataclass
class Build:
    """Output of a builder.

    Attributes:
        samples: of each split, in the order of the lines.
        dropped: what was left out.
        notes: other counts and figures worth knowing.
        tables: lines to print, such as a distribution of labels.
        missing: cells without a value that were read, by column.
    """

    samples: dict[str, list[Sample]]
    dropped: Dropped = field(default_factory=Dropped)
    notes: dict[str, Any] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Origin:
    """Origin of a folder; the same origin gives the same folder.

    Attributes:
        builder: the script.
        source: the data set.
        release: which published release of it the builder was written for.
        options: what was asked for.
        inputs: the files it was made from, by name, each with `sha256` and `bytes`.
    """

    builder: str
    source: str
    release: str
    options: dict[str, Any]
    inputs: dict[str, dict[str, Any]]

    def describe(self) -> dict[str, Any]:
        """The part of the card that a later run is compared with."""
        return {
            "builder": self.builder,
            "version": VERSION,
            "source": self.source,
            "release": self.release,
            "options": self.options,
            "inputs": self.inputs,
        }


def split_by_patient(
    samples: Sequence[Sample], shares: Shares, seed: int, together: Sequence[str] | None = None
) -> dict[str, list[Sample]]:
    """Deal samples out at random, all of a patient to one split; see `random_split`.

    Args:
        samples: all of them.
        shares: of the splits.
        seed: of the split.
        together: of each sample, the name of what must be in one split; its patient by default.
    """
    units = [sample.patient for sample in samples] if together is None else together
    split = random_split(Counter(units), shares, seed)
    return {
        name: [s for s, unit in zip(samples, units, strict=True) if split[unit] == name]
        for name in SPLITS
    }


def samples_by_split(
    samples: Sequence[Sample], split: Mapping[str, str]
) -> dict[str, list[Sample]]:
    """The samples of each split, in their order, by the split of their patient."""
    return {
        name: [sample for sample in samples if split[sample.patient] == name] for name in SPLITS
    }


def is_built(root: Path, origin: Origin, *, force: Replaced) -> bool:
    """Return whether `root` holds this very build already, complete and unchanged.

    Args:
        root: the folder.
        origin: where the build comes from.
        force: which other builds are replaced: `all`, or builds that differ in nothing but
            the content of the folder of `images`, to which more may have been fetched.

    Raises:
        DataError: it holds something that is not to be replaced.
    """
    if force == "all" or not root.exists():
        return False
    present = sorted(path.name for path in root.iterdir() if path.suffix == ".tok")
    card = read_card(root)
    if not present and not card:
        return False
    if not card:
        raise DataError(
            f"{root}: holds {present[0]} without a {CARD}, so it was not made by this script or "
            "was interrupted. Replace it with --force or give another folder with --root."
        )
    wanted = json.loads(json.dumps(origin.describe()))
    differs = _differences(card, wanted)
    if differs and not (force == "images" and differs.keys() == {"images"}):
        raise DataError(
            f"{root}: was made with {'; '.join(differs.values())}. Replace it with --force or give "
            "another folder with --root."
        )
    for name, facts in card.get("files", {}).items():
        path = root / name
        if not path.is_file() or sha256_of(path) != facts["sha256"]:
            raise DataError(f"{path}: is missing or was changed. Build it again with --force.")
    return not differs


def write_folder(root: Path, build: Build, origin: Origin, *, report_file: str) -> dict[str, Any]:
    """Write the line files and then the card, which marks the folder as complete.

    Files of an earlier build go first, so that no mixture of two builds remains.

    Args:
        root: the folder.
        build: what to write.
        origin: where it comes from.
        report_file: name of the file of reports after the split, such as `report.tok`.

    Returns:
        The card.

    Raises:
        DataError: nothing is left to write, or a label holds a comma, which separates labels.
    """
    beside = root.with_name(f"{root.name}.{LEFT_OUT}")
    _check(build, beside)
    draft = root.with_name(f".{root.name}.partial-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for split, samples in build.samples.items():
            for name, lines in _files(samples, report_file).items():
                text = "".join(f"{line}\n" for line in lines)
                (draft / f"{split}.{name}").write_text(text, encoding="utf-8", newline="\n")
        if build.dropped.rows:
            _write_left_out(draft / LEFT_OUT, build.dropped)
        card = origin.describe() | _facts(build, draft)
        (draft / CARD).write_text(
            json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        root.mkdir(parents=True, exist_ok=True)
        for old in [root / CARD, root / LEFT_OUT, *root.glob("*.tok")]:
            old.unlink(missing_ok=True)
        for path in sorted(draft.iterdir(), key=lambda path: path.name == CARD):
            os.replace(path, root / path.name)
        beside.unlink(missing_ok=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return card


def read_card(root: Path) -> dict[str, Any]:
    """The card of a folder; empty when it has none."""
    try:
        card = json.loads((root / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _files(samples: Sequence[Sample], report_file: str) -> dict[str, list[str]]:
    files = {
        "image.tok": [join_names(sample.images) for sample in samples],
        report_file: [_one_line(sample.report) for sample in samples],
        "label.tok": [_one_line(",".join(sample.labels)) for sample in samples],
        "patient.tok": [_one_line(sample.patient) for sample in samples],
    }
    return {name: lines for name, lines in files.items() if all(lines)}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _facts(build: Build, folder: Path) -> dict[str, Any]:
    kept, labels = {}, {}
    for split, samples in build.samples.items():
        kept[split] = {
            "lines": len(samples),
            "images": sum(len(sample.images) for sample in samples),
            "patients": len({sample.patient for sample in samples}),
        }
        named = (name for sample in samples for name in sample.labels)
        seen = Counter(name for name in named if not name.startswith(UNKNOWN))
        labels[split] = dict(sorted(seen.items()))
    files = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        files[path.name] = {
            "lines": content.count(b"\n"),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    return {
        "kept": kept,
        "dropped": build.dropped.counts(),
        "missing": dict((+build.missing).most_common()),
        "notes": build.notes,
        "labels": labels,
        "files": files,
    }


def _check(build: Build, beside: Path) -> None:
    """Refuse invalid builds; if nothing is left, `beside` is the list of left-out samples."""
    empty = [split for split, samples in build.samples.items() if not samples]
    for split in empty:
        del build.samples[split]
    if empty:
        build.notes["splits without a sample"] = ", ".join(empty)
    if not build.samples:
        if not build.dropped.rows:
            raise DataError("No samples are left to train on: there was no input.")
        beside.parent.mkdir(parents=True, exist_ok=True)
        _write_left_out(beside, build.dropped)
        reasons = "".join(f"\n  left out {line}" for line in build.dropped.summary())
        raise DataError(
            f"No samples are left to train on.{reasons}\n"
            f"  all that is left out, with reasons: {beside}"
        )
    for samples in build.samples.values():
        for sample in samples:
            for name in sample.labels:
                if "," in name:
                    raise DataError(
                        f"The label '{brief(name)}' of {shown(sample.images)} holds a comma, which "
                        "separates labels in the files. Rename it."
                    )


def _write_left_out(path: Path, dropped: Dropped) -> None:
    # Names may hold bytes that are no UTF-8.
    path.write_text(dropped.text(), encoding="utf-8", errors="backslashreplace", newline="\n")


def _differences(card: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return the differences between a card and the wanted one, by their name."""
    differs = {}
    for key, value in wanted.items():
        given = card.get(key)
        if isinstance(value, dict) and isinstance(given, dict):
            for name in sorted(value.keys() | given.keys()):
                if value.get(name) == given.get(name):
                    continue
                if key == "inputs":
                    differs[name] = f"{name} of other content"
                else:
                    before, now = brief(str(given.get(name))), brief(str(value.get(name)))
                    differs[name] = f"{name} {before} instead of {now}"
        elif given != value:
            differs[key] = f"{key} {brief(str(given))} instead of {brief(str(value))}"
    return differs
