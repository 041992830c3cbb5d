"""Data check: validates a data set before training."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vilmedic.config.load import Config
from vilmedic.datasets.aligned import TOLERATED
from vilmedic.datasets.decode import UndecodableImage
from vilmedic.datasets.image import ImageDataset, open_image_source
from vilmedic.datasets.label import LabelDataset, read_labels
from vilmedic.datasets.lines import SHOWN, Lines, listed, read_lines
from vilmedic.datasets.report_text import chain_name
from vilmedic.datasets.text import TextDataset
from vilmedic.errors import ConfigError, DataError, VilmedicError
from vilmedic.log import counted
from vilmedic.preparation.image_facts import ImageFacts, examine_images, negatives_by_split
from vilmedic.preparation.report_facts import (
    LostLetters,
    UnknownWords,
    duplicate_groups,
    lost_letters,
    misread,
    repeated_share,
    unknown_words,
    with_control_characters,
)
from vilmedic.preparation.splitting import group_key
from vilmedic.registry import DATASETS

PARTS: dict[str, type] = {"image": ImageDataset, "seq": TextDataset, "label": LabelDataset}
PATIENT_FILE = "patient.tok"
MANY_DUPLICATES = 0.2  # near-duplicates in a split that a contrastive loss suffers from
MANY_CUT = 0.05
MANY_UNKNOWN = 0.05  # words that a tokenizer does not know
SAMPLES = 12  # small images of the training split to look at, and half as many of each other one
_PATIENT = re.compile(r"(?:^|/)(p\d{8}|patient\d+)(?:/|$)")  # of MIMIC-CXR and of CheXpert


@dataclass
class SplitFacts:
    """Findings of the check about a split.

    Attributes:
        lines: of each part's file; a part that cannot be read is missing.
        images: what the images are like.
        texts: the reports as they are in their file.
        named: paths of the images, with the line of each.
        missing: lines with an image that is not there.
        empty: reports without a text, before or after cleaning.
        reports: exact and near duplicate group of each report that is not empty.
        most_frequent: a report that is there most often, and how often that is.
        lengths: ids of each report.
        max_len: most ids that a report may have.
        lost: letters that cleaning drops; None without cleaning.
        unknown: words that the tokenizer does not know; None where that is not known.
        labels: how many lines have each label.
        patients: who each line is of; None when that is not known.
    """

    lines: dict[str, int] = field(default_factory=dict)
    images: ImageFacts | None = None
    texts: Sequence[str] = ()
    missing: int = 0
    named: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    reports: tuple[np.ndarray, np.ndarray] | None = None
    most_frequent: tuple[str, int] = ("", 0)
    lengths: np.ndarray | None = None
    max_len: int = 0
    lost: LostLetters | None = None
    unknown: UnknownWords | None = None
    labels: Counter[str] = field(default_factory=Counter)
    patients: list[str] | None = None


@dataclass
class Findings:
    """The result of a check.

    Attributes:
        parts: what the data set reads, names of `PARTS`.
        splits: what was found out, by split.
        errors: problems that prevent or stop a run or spoil its result.
        warnings: cases in which a run would see something else than the files show.
        advice: hints about data that a run would see as they are.
        named: complete lists of files, lines or names behind the messages, by their heading.
    """

    parts: tuple[str, ...] = ()
    splits: dict[str, SplitFacts] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    named: dict[str, list[str]] = field(default_factory=dict)

    def listed(self, where: str, items: Sequence[str], kind: str, what: str = "") -> str:
        """Return `2 blank images: a, b`, with the first few of many; `named` keeps all.

        Args:
            where: the split, or several.
            items: the items.
            kind: noun for an item.
            what: their common property, if the noun does not name it.
        """
        if len(items) > SHOWN:
            name = f"{where}: {len(items)} {kind}s{f' {what}' if what else ''}"
            self.named.setdefault(name, []).extend(items)
        return listed(items, kind)


def check_data(config: Config, *, most: int | None = None, workers: int = 0) -> Findings:
    """Check all data that a configuration would train and evaluate on.

    Args:
        config: the checked configuration.
        most: images of a split to decode, evenly over it; None takes all.
        workers: threads that decode, 0 for one per core.

    Raises:
        ConfigError: the data set is of a kind that has neither images, reports nor labels.
    """
    parts = _parts(config)
    names = ["train", *config.validator.splits, *config.ensemblor.splits]
    findings = Findings(tuple(parts))
    with tempfile.TemporaryDirectory() as run_dir:
        for split in dict.fromkeys(names):
            check = _SplitCheck(split, parts, findings, Path(run_dir))
            findings.splits[split] = check.facts
            check.run(most, workers)
    _compare_splits(findings)
    _find_negatives(findings)
    return findings


def _parts(config: Config) -> dict[str, dict[str, Any]]:
    """The settings of images, reports and labels, with their defaults."""
    node = dict(config.dataset)
    cls = DATASETS.get(node["proto"])
    nodes = {name: node for name, part in PARTS.items() if issubclass(cls, part)}
    nodes = nodes or {name: node[name] for name in PARTS if isinstance(node.get(name), dict)}
    if not nodes:
        raise ConfigError(
            f"dataset.proto: {node['proto']} has none of the sections {', '.join(PARTS)}, which "
            "are what can be checked."
        )
    return {name: _defaults(PARTS[name]) | dict(given) for name, given in nodes.items()}


def _defaults(cls: type) -> dict[str, Any]:
    found = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in found if p.default is not inspect.Parameter.empty}


class _SplitCheck:
    """Checks one split and notes what it finds."""

    def __init__(
        self, split: str, parts: dict[str, dict[str, Any]], findings: Findings, run_dir: Path
    ) -> None:
        self.split, self.parts, self.findings, self.run_dir = split, parts, findings, run_dir
        self.facts = SplitFacts()
        self.faulty: dict[str, Lines] = {}

    def run(self, most: int | None, workers: int) -> None:
        lines: dict[str, Lines] = {}
        for name, given in self.parts.items():
            try:
                lines[name] = read_lines(given["root"], self.split, given["file"])
            except DataError as error:
                self.error(str(error))
                # The remaining lines of a faulty file still show problems of the others.
                self.faulty |= _whatever_lines(given["root"], self.split, given["file"], name)
        lines |= self.faulty
        self.facts.lines = {name: len(texts) for name, texts in lines.items()}
        if len(set(self.facts.lines.values())) > 1:
            counts = ", ".join(f"{texts.path} {len(texts)}" for texts in lines.values())
            self.error(f"The files have different numbers of lines: {counts}.")
        if "image" in lines and "image" not in self.faulty:
            self.images(lines["image"], most, workers)
        if "seq" in lines:
            self.facts.texts = lines["seq"]
            self.reports(lines["seq"])
        if "label" in lines:
            self.labels(lines["label"])
        self.facts.patients = self.patients(lines)

    def images(self, texts: Lines, most: int | None, workers: int) -> None:
        given = self.parts["image"]
        names = ("root", "image_path", "ext", "color", "resize", "spool", "spool_gib", "max_pixels")
        try:
            source = open_image_source(
                texts,
                split=self.split,
                most=given["multi_image"],
                **{name: given[name] for name in names},
            )
            missing = source.missing()
        except DataError as error:
            self.error(str(error))
            return
        self.facts.missing = len(missing)
        for line in range(len(texts)):
            for place in source.places(line):
                self.facts.named.setdefault(place, line)
        repeated = [
            f"{texts.where(line)}: {place}"
            for line in range(len(texts))
            for place in source.places(line)
            if self.facts.named[place] != line
        ]
        if repeated:
            what = "on more than one line"
            self.advice(f"{self.listed(repeated, 'image', what)}, {what}.")
        facts = examine_images(
            source,
            set(missing),
            most=most,
            workers=workers,
            title=f"Images of {self.split}",
            samples=SAMPLES if self.split == "train" else SAMPLES // 2,
        )
        self.facts.images = facts
        known = sum(len(source.names(n)) for n in range(len(texts)) if n not in missing)
        if facts.looked_at < known:
            self.advice(
                f"{facts.looked_at:,} of {known:,} images were decoded, as --images says; the "
                "pixels of the others are not checked."
            )
        bad = len(missing) + len(facts.unreadable)
        tolerated = given["on_error"] == "skip" and bad <= TOLERATED * len(texts)
        note = self.warning if tolerated else self.error
        if missing:
            note(f"{self.listed(list(missing.values()), 'missing image')}. {source.remedy}.")
        if facts.unreadable:
            note(self.listed(facts.unreadable, "unreadable image"))
        if facts.blank:
            self.warning(f"{self.listed(facts.blank, 'blank image')}, all pixels of one value.")
        self.doubtful_images(facts)
        crop = given["crop"]
        if given["resize"] is None and crop is not None:
            small = sum(min(size) < crop for size in facts.sizes)
            if small:
                self.error(
                    f"{counted(small, 'image is', 'images are')} smaller than crop={crop}, and "
                    "resize is null."
                )
                return
        if len(missing) <= TOLERATED * len(texts):  # with more, no data set can be made
            self.made_image(given, set(missing))

    def doubtful_images(self, facts: ImageFacts) -> None:
        """Report images that can be decoded but are probably wrong."""
        for fault, places in facts.doubtful.items():
            self.warning(f"{self.listed(places, 'image', fault)}, {fault}.")
        if facts.noted:
            kind = "note on images that contradict their headers"
            text = self.listed(facts.noted, kind)
            self.advice(f"{text}. Each is read by its content.")

    def made_image(self, given: dict[str, Any], missing: set[int]) -> None:
        """Preprocess an image as a run would: resized, transformed and cropped."""
        settings = {key: value for key, value in given.items() if key != "proto"}
        settings |= self.runtime() | {"cache": None, "tokens": None, "on_error": "skip"}
        try:
            data = ImageDataset(**settings)
            for line in sorted(set(range(len(data.texts))) - missing):
                try:
                    data.images(line)
                except UndecodableImage:
                    continue  # has been reported
                break
        except (VilmedicError, ValueError) as error:
            self.error(str(error))

    def labels(self, texts: Lines) -> None:
        for text in texts:
            with suppress(ValueError):  # reported below
                self.facts.labels.update(read_labels(text)[0])
        if "label" in self.faulty:
            return
        given = {key: value for key, value in self.parts["label"].items() if key != "proto"}
        try:
            LabelDataset(**given | {"split": self.split, "run_dir": self.run_dir})
        except (VilmedicError, ValueError) as error:
            # Each split reads the labels of all of them, and one mention of a fault is enough.
            if not any(known.endswith(str(error)) for known in self.findings.errors):
                self.error(str(error))

    def runtime(self) -> dict[str, Any]:
        """Arguments that a run gives a data set besides its settings."""
        training = self.split == "train"
        return {"split": self.split, "training": training, "seed": 0, "run_dir": self.run_dir}

    def reports(self, texts: Lines) -> None:
        given = {key: value for key, value in self.parts["seq"].items() if key != "proto"}
        cleaned: list[str] = list(texts)
        data: TextDataset | None = None
        try:
            if "seq" not in self.faulty:
                data = TextDataset(**given | self.runtime())
        except (VilmedicError, ValueError) as error:
            self.error(str(error))
        if data is not None:
            cleaned = list(data.cleaned)
            self.tokens(data, texts, cleaned)
            if data.dropped:
                dropped = list(data.dropped.values())
                self.warning(self.listed(dropped, "report empty after cleaning"))
        if data is not None and data.processing is not None:
            self.letters(chain_name(data.processing), texts, cleaned)
        for lines, kind, what in (
            (misread(texts), "misread report", "with signs of a wrong character set (\ufffd, Ã³)"),
            (with_control_characters(texts), "report", "with control characters"),
        ):
            if lines:
                where = [texts.where(line) for line in lines]
                self.warning(f"{self.listed(where, kind, what)}, {what}.")
        self.facts.empty = cleaned.count("")
        self.facts.reports = duplicate_groups([text for text in cleaned if text])
        exact, near = self.facts.reports
        kept = [line for line, text in enumerate(cleaned) if text]
        if len(exact):
            group, count = Counter(exact.tolist()).most_common(1)[0]
            self.facts.most_frequent = (texts[kept[int(np.argmax(exact == group))]], count)
        if repeated_share(near) > MANY_DUPLICATES:
            again = np.setdiff1d(np.arange(len(near)), np.unique(near, return_index=True)[1])
            where = [texts.where(kept[place]) for place in again]
            self.advice(
                f"{repeated_share(near):.1%} of the reports nearly repeat another one, so a batch "
                "holds pairs that a contrastive loss pushes apart though they belong together: "
                f"{self.listed(where, 'line', 'that nearly repeat another one')}."
            )

    def tokens(self, data: TextDataset, texts: Lines, cleaned: list[str]) -> None:
        """Check the tokenization of the reports: lengths and unknown words."""
        tokenizer = data.tokenizer
        encoded = tokenizer([text or " " for text in cleaned], truncation=False)
        self.facts.lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        self.facts.max_len = data.tokenizer_max_len
        cut = np.flatnonzero(self.facts.lengths > data.tokenizer_max_len)
        if len(cut) > MANY_CUT * len(cleaned):
            where = self.listed(
                [texts.where(line) for line in cut.tolist()], "line", "that are cut"
            )
            self.warning(
                f"{len(cut) / len(cleaned):.1%} of the reports are longer than "
                f"tokenizer_max_len={data.tokenizer_max_len} and are cut: {where}."
            )
        unknown = unknown_words(encoded.encodings, tokenizer, cleaned)
        self.facts.unknown = unknown
        if unknown.share > MANY_UNKNOWN:
            often = ", ".join(f"{word} ({n})" for word, n in unknown.words.most_common(SHOWN))
            where = self.listed(
                [texts.where(line) for line in unknown.lines], "line", "with unknown words"
            )
            self.warning(
                f"{unknown.share:.1%} of the words are unknown to the tokenizer, most often "
                f"{often}; {where}."
            )

    def letters(self, processing: str, texts: Lines, cleaned: list[str]) -> None:
        """Check which letters the cleaning of reports drops."""
        lost = lost_letters(texts, cleaned)
        self.facts.lost = lost
        if lost.never:
            often = ", ".join(f"{letter} ({n})" for letter, n in lost.never.most_common(SHOWN))
            where = self.listed(
                [texts.where(line) for line in lost.lines], "line", "with letters that are dropped"
            )
            self.warning(
                f"processing={processing} drops {counted(lost.never.total(), 'letter')} that it "
                "never "
                f"keeps, most often {often}; processing=multilingual_clean_report keeps all. "
                f"{where}."
            )

    def patients(self, lines: dict[str, Lines]) -> list[str] | None:
        """Return the patient of each line, from a file of ids or from the image paths."""
        for given in self.parts.values():
            if (Path(given["root"]) / f"{self.split}.{PATIENT_FILE}").is_file():
                try:
                    found = read_lines(given["root"], self.split, PATIENT_FILE)
                except DataError as error:
                    self.error(str(error))
                    return None
                if len(found) not in self.facts.lines.values():
                    self.error(
                        f"{found.path} has {counted(len(found), 'line')}, unlike the other files."
                    )
                return list(found)
        matches = [_PATIENT.search(text) for text in lines.get("image", ())]
        if not matches or None in matches:
            return None
        return [match[1] for match in matches if match]

    def error(self, text: str) -> None:
        self.findings.errors.append(f"{self.split}: {text}")

    def warning(self, text: str) -> None:
        self.findings.warnings.append(f"{self.split}: {text}")

    def advice(self, text: str) -> None:
        self.findings.advice.append(f"{self.split}: {text}")

    def listed(self, items: Sequence[str], kind: str, what: str = "") -> str:
        return self.findings.listed(self.split, items, kind, what)


def _whatever_lines(root: str, split: str, file: str, name: str) -> dict[str, Lines]:
    """The lines of a faulty file under the name of its part; nothing when there are none."""
    path = Path(root) / f"{split}.{file}"
    if not path.is_file():
        return {}
    content = path.read_bytes().decode(errors="replace").removesuffix("\n")
    return {name: Lines([line.strip() for line in content.split("\n")], path)} if content else {}


def _find_negatives(findings: Findings) -> None:
    """Images that are dark where most of the others of all splits are bright."""
    known = {name: facts.images for name, facts in findings.splits.items() if facts.images}
    for name, places in negatives_by_split(known).items():
        if places:
            what = "a negative of what most images look like"
            text = f"{findings.listed(name, places, 'image', what)}, {what}."
            findings.warnings.append(f"{name}: {text}")


def _compare_splits(findings: Findings) -> None:
    """Checks across splits: patients and images in two of them, labels in one only."""
    known = list(findings.splits.items())
    for place, (name, facts) in enumerate(known):
        for other_name, other in known[place + 1 :]:
            pair = f"{name} and {other_name}"
            if facts.patients is not None and other.patients is not None:
                shared = _shared_patients(facts.patients, other.patients)
                if shared:
                    names = findings.listed(pair, shared, "patient", "in both")
                    findings.errors.append(f"{pair}: {names} in both.")
            images = sorted(facts.named.keys() & other.named.keys())
            if images:
                names = findings.listed(pair, images, "image", "in both")
                findings.errors.append(f"{pair}: {names} in both.")
            copies = _copies(facts, other)
            if copies:
                names = findings.listed(pair, copies, "image", "in both, under names of their own")
                findings.errors.append(f"{pair}: {names} in both, under names of their own.")
    trained = findings.splits["train"].labels
    for name, facts in known[1:]:
        unseen = sorted(facts.labels.keys() - trained.keys()) if trained else []
        if unseen:
            names = findings.listed(name, unseen, "label", "not in train")
            findings.advice.append(f"{name}: {names} not in train.")


def _shared_patients(patients: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return patients in both splits; `1 (also 1.0)` for one patient with two spellings."""
    named = {group_key(name): name for name in patients}
    found = {}
    for name in others:
        known = named.get(group_key(name))
        if known is not None:
            found[known] = known if known == name else f"{known} (also {name})"
    return sorted(found.values())


def _copies(facts: SplitFacts, other: SplitFacts) -> list[str]:
    """Images of the same pixels in both splits, where their paths differ."""
    if facts.images is None or other.images is None:
        return []
    known: dict[str, str] = {}
    for place, content in facts.images.contents.items():
        known.setdefault(content, place)
    return sorted(
        f"{known[content]} = {place}"
        for place, content in other.images.contents.items()
        if content in known and place not in facts.named
    )
