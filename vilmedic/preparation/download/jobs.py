"""Steps after a download: resize images, unpack archives, convert models, run builders."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vilmedic.datasets.decode import SUFFIXES
from vilmedic.errors import ConfigError, DataError, nearest
from vilmedic.files import BLOCK, DAMAGE, confined, open_tar, walk_files
from vilmedic.log import counted
from vilmedic.preparation.builders.mimic_cxr import image_path
from vilmedic.preparation.command import is_present
from vilmedic.preparation.download.http import (
    Job,
    NoAccess,
    NotThere,
    Transfer,
    Unreachable,
    disk_error,
)
from vilmedic.preparation.download.progress import SPARE, readable
from vilmedic.preparation.download.resources import Expected, HubModel, Images, Resource, Unpack
from vilmedic.preparation.resize import LEFT_OUT, UNREADABLE, resize_short_side_file, resize_tree
from vilmedic.preparation.splitting import SPLITS
from vilmedic.tables import read_table

DONE = ".complete"
UNUSABLE = (None, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Errors caused by the archive, not by the disk: conflicting members, names that are
too long, and bad data (bz2 raises an `OSError` without a number)."""
_SUM = re.compile(r"([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?(.+)")
_SCRIPT = re.compile(r"make_\w+")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Subset:
    """The studies to fetch the images of.

    Attributes:
        split: of one split only; empty for all.
        first: only so many studies, in the order of the table; None for all.
    """

    split: str = ""
    first: int | None = None


@dataclass(frozen=True)
class ImageJob:
    """One image.

    Attributes:
        name: its path in the release.
        original: what to fetch.
        target: where the smaller image goes.
    """

    name: str
    original: Job
    target: Path


def parse_subset(text: str) -> Subset:
    """A subset out of `500`, `validate` or `validate:500`.

    Raises:
        ConfigError: it is none of these.
    """
    split, colon, number = text.rpartition(":")
    if not colon and not number.isdecimal():
        split, number = text, ""
    if split and split not in SPLITS:
        raise ConfigError(
            f"--subset {text}: '{split}' is no split; allowed are a number of studies, "
            f"{', '.join(SPLITS)}, or both such as validate:500.{nearest(split, SPLITS)}"
        )
    if (number or colon) and (not number.isdecimal() or int(number) == 0):
        raise ConfigError(f"--subset {text}: '{number}' is no number of studies.")
    return Subset(split, int(number) if number else None)


def list_images(split_table: Path, subset: Subset) -> list[str]:
    """The paths of the images of a subset, in the order of the table of splits."""
    chosen: set[str] = set()
    names = []
    columns = ["subject_id", "study_id", "split", "dicom_id"]
    for patient, study, split, dicom in read_table(split_table, columns):
        if subset.split and split != subset.split:
            continue
        if study not in chosen:
            if subset.first is not None and len(chosen) >= subset.first:
                continue
            chosen.add(study)
        names.append(image_path(patient, study, dicom))
    if not names:
        raise DataError(f"{split_table} lists no image of the split '{subset.split}'.")
    return names


def read_sums(path: Path, wanted: set[str]) -> dict[str, str]:
    """The published sums of some files, out of a `SHA256SUMS.txt`."""
    sums = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                found = _SUM.fullmatch(line.strip())
                if found and found[2] in wanted:
                    sums[found[2]] = found[1].lower()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    return sums


def image_jobs(
    images: Images, names: list[str], sums: dict[str, str], data: Path, target: Path, page: str
) -> Iterator[ImageJob]:
    """Jobs for the images, made lazily: there are hundreds of thousands.

    Raises:
        DataError: an image has no published sum.
    """
    for name in names:
        if name not in sums:
            raise DataError(f"{images.sums} has no sum of {name}: table and sums do not agree.")
        path = data / images.originals / name
        job = Job(images.base.rstrip("/") + "/" + name, path, sha256=sums[name], page=page)
        yield ImageJob(name, job, target / name)


def not_done(names: list[str], target: Path, originals: Path | None) -> list[str]:
    """The images that were not fetched and made smaller before.

    Args:
        names: paths in the release.
        target: folder of the smaller images.
        originals: folder of the originals, when these are kept.
    """
    listed: dict[Path, set[str]] = {}
    folders = [target] if originals is None else [target, originals]
    return [
        name for name in names if not all(is_present(place / name, listed) for place in folders)
    ]


def fetch_image(transfer: Transfer, images: Images, job: ImageJob, *, keep: bool) -> None:
    """Fetch an image, make it smaller, and drop the original unless it is kept."""
    transfer.fetch(job.original)
    try:
        if not job.target.is_file():
            resize_short_side_file(job.original.path, job.target, images.short_side, images.quality)
        if not keep:
            job.original.path.unlink()
    except OSError as error:
        raise disk_error(job.target, error) from error


def check_expected(name: str, resource: Resource, data: Path) -> None:
    """Look for what the user has to put in place.

    Raises:
        DataError: something is missing; the message says how to get it and where it goes.
    """
    missing = [one for one in resource.expected if not _matches(data, one)]
    if not missing:
        return
    found = [one for one in resource.expected if one not in missing]
    lines = [
        f"{name} can be fetched after registration only. Register at {resource.page} "
        f"({resource.terms}), fetch it as described there, and put in place:",
        *(f"  missing: {data / one.path}  ({one.what})" for one in missing),
        *(f"  found:   {data / one.path}  ({one.what})" for one in found),
        "Then run this command again; it makes the images smaller and builds the training folder.",
    ]
    raise DataError("\n".join(lines))


def is_unpacked(step: Unpack, target: Path, data: Path) -> bool:
    """Return whether the images of an archive were all made smaller before."""
    if not step.archive:
        return False  # the tree is scanned again for new images
    note = target / DONE
    return note.is_file() and note.read_text() == _note(step, data)


def unpack_and_resize(step: Unpack, target: Path, data: Path, *, keep: bool, workers: int) -> None:
    """Make the images of an archive or a folder smaller, each once.

    Args:
        step: which.
        target: where the smaller images go.
        data: the data folder.
        keep: leave the unpacked originals; those that the user put in place always stay.
        workers: processes, 0 for one per core.
    """
    folder = data / step.folder
    if step.archive:
        print(f"Unpacking {data / step.archive}", flush=True)
        unpack(data / step.archive, folder, most=2 * step.bytes + SPARE)  # the table rounds
    found = resize_tree(
        _image_root(folder) if step.archive else folder,
        target,
        step.short_side,
        suffix=step.suffix,
        quality=step.quality,
        workers=workers,
    )
    print(f"{target}: {counted(found.written, 'image')} written, {found.present:,} there already")
    if found.unreadable:
        print(
            f"  {counted(len(found.unreadable), 'image')} cannot be read and will be left out; see "
            f"{target / UNREADABLE}"
        )
    if found.left_out:
        print(
            f"  left out, of other kinds: {counted(len(found.left_out), 'file')}; see "
            f"{target / LEFT_OUT}"
        )
    if step.archive:
        (target / DONE).write_text(_note(step, data))
        if not keep:
            shutil.rmtree(folder)


def run_script(command: tuple[str, ...], scripts: Path, data: Path) -> None:
    """Run one of the scripts that build a training folder.

    Args:
        command: its name and its arguments, where `{data}` stands for the data folder.
        scripts: the folder of the scripts.
        data: the data folder.

    Raises:
        ConfigError: there is no such script.
        DataError: it failed.
    """
    script = scripts / f"{command[0]}.py"
    if not _SCRIPT.fullmatch(command[0]) or not script.is_file():
        raise ConfigError(f"There is no script {command[0]} in {scripts} to run afterwards.")
    arguments = [part.replace("{data}", str(data)) for part in command[1:]]
    shown = shlex.join(["python", str(script), *arguments])
    print(f"Running {shown}", flush=True)
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, str(script), *arguments], env=environment)
    if done.returncode:
        raise DataError(
            f"All is downloaded, but the last step failed (see above). Fix it and run: {shown}"
        )


def has_model(folder: Path) -> bool:
    """Return whether a folder holds a configuration, weights and a vocabulary."""
    weights = any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
    words = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
    return (folder / "config.json").is_file() and weights and words


def fetch_model(model: HubModel, folder: Path, parallel: int) -> bool:
    """Fetch a model unless it is there; huggingface_hub resumes what was interrupted.

    Returns:
        Whether it had to be fetched.

    Raises:
        DataError: the hub has none of that name, gives no access, or cannot be reached.
    """
    if has_model(folder):
        return False
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        hub.snapshot_download(
            model.repo,
            local_dir=folder,
            allow_patterns=list(model.patterns) or None,
            max_workers=parallel,
        )
    except errors.GatedRepoError:
        raise NoAccess(
            f"The model {model.repo} needs your consent: give it at "
            f"https://huggingface.co/{model.repo}, then run `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotThere(f"The hub has no model {model.repo}.") from None
    except Exception as error:  # the hub client raises errors of many libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unreachable(
            f"The model {model.repo} could not be fetched ({reason}). Is HF_HUB_OFFLINE set, or "
            "the network down? Run the same command again to resume."
        ) from None
    if not has_model(folder):
        raise NotThere(f"{folder}: {model.repo} has no weights or vocabulary of a known form.")
    return True


def unpack(archive: Path, folder: Path, most: int = 0) -> bool:
    """Unpack a `.tgz`, `.tar` or `.zip` into a folder, which appears when it is complete.

    Only plain files are taken. A member whose name leads out of the folder, or that is a link, a
    device or a file with holes, ends it: no published archive of images has any. So does an
    archive that unpacks to more than is expected of it, before it fills the disk.

    Args:
        archive: the file.
        folder: where its members go; left alone when it is there.
        most: bytes that it may unpack to; 0 for any number.

    Returns:
        Whether anything was unpacked.

    Raises:
        DataError: the archive is damaged or has such a member.
        NoSpace: the disk is full.
    """
    if folder.is_dir():
        return False
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    unpacked = 0
    try:
        members = _zip_members(archive) if zipfile.is_zipfile(archive) else _tar_members(archive)
        for name, content in members:
            try:
                target = confined(draft, name)
            except ValueError as error:
                raise DataError(
                    f"{archive}: the member {name[:100]!r} is refused: {error}."
                ) from None
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, open(target, "wb") as file:
                while chunk := content.read(BLOCK):
                    unpacked += len(chunk)
                    if most and unpacked > most:
                        raise DataError(
                            f"{archive} unpacks to more than {readable(most)}, which is more than "
                            "can be expected of it, so nothing of it is kept. Remove it and fetch "
                            "it again."
                        )
                    file.write(chunk)
        draft.rename(folder)
    except DAMAGE as error:
        raise DataError(f"{archive} is damaged: {error}. Remove it and run this again.") from None
    except OSError as error:
        if error.errno in UNUSABLE:
            reason = error.strerror or error
            raise DataError(
                f"{archive} is damaged: {reason}. Remove it and run this again."
            ) from None
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def _matches(data: Path, expected: Expected) -> bool:
    folder, deep, name = expected.path.partition("/**/")
    if deep:
        return any(path.match(name) for path in walk_files(data / folder))
    return any(True for _ in data.glob(expected.path))


def _image_root(folder: Path) -> Path:
    """The folder that holds the images themselves: archives may wrap them in others."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if len(entries) == 1 and entries[0].is_dir():
        return _image_root(entries[0])
    if not any(entry.suffix.lower() in SUFFIXES for entry in entries):
        names = ", ".join(sorted(entry.name for entry in entries)[:5]) or "nothing"
        raise DataError(f"{folder} holds no images but {names}.")
    return folder


def _note(step: Unpack, data: Path) -> str:
    size = (data / step.archive).stat().st_size
    return f"{step.archive}\t{size}\t{step.short_side}\t{step.suffix}\t{step.quality}\n"


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with open_tar(archive) as opened:
        for member in opened:
            if member.isdir():
                continue
            plain = member.isreg() and not member.issparse()
            content = opened.extractfile(member) if plain else None
            if content is None:
                raise DataError(f"{archive}: the member '{member.name}' is no plain file.")
            yield member.name, content


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.filename.endswith("/"):  # a folder; `is_dir` stumbles over an empty name
                continue
            if (member.external_attr >> 28) not in (0, 0o10):  # the kind of file, by Unix
                raise DataError(f"{archive}: the member '{member.filename}' is no plain file.")
            yield member.filename, opened.open(member)
