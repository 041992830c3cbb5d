"""Shared command line of the builders: options, messages, exit statuses."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vilmedic.datasets.lines import shown
from vilmedic.errors import DataError, VilmedicError, escaped
from vilmedic.files import disk_message, sha256_of, walk_files
from vilmedic.log import Progress, counted
from vilmedic.preparation.folder import (
    CARD,
    LEFT_OUT,
    Build,
    Origin,
    Replaced,
    is_built,
    write_folder,
)
from vilmedic.preparation.splitting import Shares, parse_shares
from vilmedic.script import argument_parser, count
from vilmedic.tables import MISSING

REPORT_FILES = {"both": "report.tok", "findings": "findings.tok", "impression": "impression.tok"}


def make_parser(doc: str, root: str) -> argparse.ArgumentParser:
    """A parser with the options that every builder has.

    Args:
        doc: the builder's description, its first paragraph being shown.
        root: folder that is built by default.
    """
    parser = argument_parser(doc)
    parser.add_argument("--root", type=Path, default=Path(root), help="folder to build")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="leave out images that are not in this folder (none: list all)",
    )
    add_missing(parser)
    parser.add_argument(
        "--force",
        nargs="?",
        const="all",
        choices=["all", "images"],
        help="replace an existing build; images: only one that differs in nothing but the "
        "content of the folder of images",
    )
    return parser


def add_section(parser: argparse.ArgumentParser, default: str = "both") -> None:
    """Add the option for the text of a report."""
    parser.add_argument(
        "--section",
        choices=list(REPORT_FILES),
        default=default,
        help="text: both goes to <split>.report.tok (impression first), findings and "
        "impression to files of their names",
    )


def add_line(parser: argparse.ArgumentParser) -> None:
    """Add the option for the content of a line."""
    parser.add_argument(
        "--line",
        choices=["study", "image"],
        default="study",
        help="one line per study with all its images, or one line per image",
    )


def add_split(parser: argparse.ArgumentParser, default: str = "0.8,0.1,0.1") -> None:
    """Add the options of a random split."""
    parser.add_argument(
        "--split",
        type=shares,
        default=default,
        metavar="TRAIN,VALIDATE,TEST",
        help="shares of the splits",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")


def add_missing(parser: argparse.ArgumentParser) -> None:
    """Add the option for texts of a table that mark a missing value."""
    parser.add_argument(
        "--missing",
        type=name_list,
        default=",".join(MISSING),
        metavar="TEXT,...",
        help="cells that count as missing, in any letter case; blank ones always do",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the option for the number of processes; the result does not depend on it."""
    parser.add_argument("--workers", type=count, default=0, help="processes, 0 for one per core")


def shares(text: str) -> Shares:
    """An argument such as `0.8,0.1,0.1`."""
    try:
        return parse_shares(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def name_list(text: str) -> tuple[str, ...]:
    """An argument of names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def guarded(script: str, call: Callable[[], int]) -> int:
    """Run a command; an error that the user can fix is printed and gives the exit code 2.

    So do errors of the disk, such as a full disk or a folder that cannot be made.
    """
    try:
        return call()
    except VilmedicError as error:
        print(escaped(f"{script}: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        print(escaped(f"{script}: {disk_message(error)}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class Next:
    """The command that uses the built folder.

    Args:
        config: the configuration written for it; None takes one that suits the folder's contents.
        reads: the folder that this configuration reads by default.
        images: the folder of images that the builder was given.
        evaluates: whether the configuration is for an evaluation.
    """

    config: str | None = None
    reads: str = ""
    images: Path | None = None
    evaluates: bool = False

    def command(self, root: Path, report_file: str) -> str:
        """The command, on several lines where it is long.

        Args:
            root: the folder.
            report_file: name of its report files after the split.
        """
        split = "test" if self.evaluates else "train"
        reports = (root / f"{split}.{report_file}").is_file()
        labels = (root / f"{split}.label.tok").is_file()
        given: list[str] = []
        if self.config is not None:
            config, name = self.config, ""
            parts = ["image", "label" if "downstream" in config else "seq"]
            parts += ["label"] if self.evaluates else []
        elif reports:
            config, parts, name = "config/SELFSUP/convirt-mimic.yml", ["image", "seq"], root.name
            # words and a text encoder are learned from the reports: nothing is downloaded for them
            given = ["dataset.seq.tokenizer=null", "model.encoder.proto=null"]
        elif labels:
            config, parts, name = "config/downstream/nih.yml", ["image", "label"], root.name
        else:
            config, parts, name = "config/SELFSUP/simclr-mimic.yml", [], root.name
        image = "dataset.image" if parts else "dataset"
        words = ["python", "bin/ensemble.py" if self.evaluates else "bin/train.py", config]
        words += [f"name={name}"] if name else ["name=<run>"] if self.evaluates else []
        if root != Path(self.reads):
            sections = [f"dataset.{part}" for part in parts] or [image]
            words += [f"{section}.root={root}" for section in sections]
        if "seq" in parts and report_file != "report.tok" and not self.evaluates:
            words.append(f"dataset.seq.file={report_file}")
        if self.images is not None:
            words.append(f"{image}.image_path={self.images}")
        if self.config is None and "SELFSUP" in config:
            words.append(f"{image}.ext=null")
        return _lines([*words, *given])


def _lines(words: Sequence[str]) -> str:
    """Wrap a command at 100 columns with backslashes."""
    lines = [""]
    for word in words:
        quoted = word if word == "name=<run>" else shlex.quote(word)
        if lines[-1] and len(lines[-1]) + len(quoted) > 95:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {quoted}" if lines[-1] else quoted
    return "\n    ".join(lines)


def make(
    root: Path,
    origin: Origin,
    build: Callable[[], Build],
    *,
    force: Replaced,
    then: Next,
    report_file: str = "report.tok",
) -> None:
    """Build a folder unless it exists; print kept and left-out samples and the next command."""
    started = time.monotonic()
    if is_built(root, origin, force=force):
        print(f"{root}: the same build is there already, nothing to do")
        print(escaped(f"Next:\n    {then.command(root, report_file)}"))
        return
    with Progress(f"Building {root}"):
        made = build()
    card = write_folder(root, made, origin, report_file=report_file)
    for line in made.tables:
        print(escaped(line))
    print(escaped(summary(root, card, made.dropped.summary())))
    print(f"{root}: written in {time.monotonic() - started:.0f} s; see {root / CARD}")
    print(escaped(f"Next:\n    {then.command(root, report_file)}"))


def summary(root: Path, card: Mapping[str, Any], left_out: Sequence[str]) -> str:
    """Summary of kept and left-out samples, in lines of text.

    Args:
        root: the folder.
        card: what is known of it.
        left_out: a text for each reason.
    """
    lines = [f"{root}: {card['source']}, {card['release']}"]
    for split, kept in card["kept"].items():
        lines.append(
            f"  kept {kept['lines']:>9,} {split} {'line' if kept['lines'] == 1 else 'lines'} "
            f"({counted(kept['images'], 'image')} of {counted(kept['patients'], 'patient')})"
        )
    lines += [f"  left out {text}" for text in left_out]
    if left_out:
        lines.append(f"  all that is left out, with reasons: {root / LEFT_OUT}")
    if card["missing"]:
        lines.append(f"  missing values by column: {_note(card['missing'])}")
    lines += [f"  {name}: {_note(value)}" for name, value in card["notes"].items() if _short(value)]
    return "\n".join(lines)


def input_facts(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Size and sum of input files, for the card."""
    return {
        name: {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for name, path in paths.items()
    }


def list_facts(folder: Path) -> dict[str, Any]:
    """Number, size and sum of the list of a folder's files: a different file, a different sum."""
    files, total, digest = 0, 0, hashlib.sha256()
    for path in walk_files(folder):
        size = path.stat().st_size
        files, total = files + 1, total + size
        digest.update(f"{path.relative_to(folder)}\t{size}\n".encode())
    return {"files": files, "bytes": total, "sha256_of_list": digest.hexdigest()}


def images_facts(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Return the data card's facts about the image folder that limits a build.

    Raises:
        DataError: there is no such folder.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} (given with --images).")
    return {"images": list_facts(folder)}


def only_present(images: list[str], folder: Path | None, listed: dict[Path, set[str]]) -> list[str]:
    """Return those of some images that are in a folder; all without a folder.

    Args:
        images: paths relative to the folder.
        folder: where they should be.
        listed: names in the folders looked at so far; each is listed once.
    """
    if folder is None:
        return images
    return [name for name in images if is_present(folder / name, listed)]


def is_present(path: Path, listed: dict[Path, set[str]]) -> bool:
    """Return whether a file is there, found by listing each folder once."""
    return path.name in names_in(path.parent, listed)


def names_in(folder: Path, listed: dict[Path, set[str]]) -> set[str]:
    """The names in a folder, none if it is not there, found by listing it once."""
    if folder not in listed:
        try:
            listed[folder] = set(os.listdir(folder))
        except PermissionError:
            raise DataError(f"{folder} cannot be listed: Permission denied.") from None
        except (OSError, ValueError):  # none there, or no name that a folder could have
            listed[folder] = set()
    return listed[folder]


def _short(value: Any) -> bool:
    """Return whether a note is printed: texts, numbers, lists and counts are, label shares not."""
    return not isinstance(value, dict) or all(isinstance(v, int) for v in value.values())


def _note(value: Any) -> str:
    if isinstance(value, dict):
        return shown([f"{name} {number:,}" for name, number in value.items()])
    return shown(value) if isinstance(value, list) else str(value)
