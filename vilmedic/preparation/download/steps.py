"""What happens before and after the transfers: files in place, images made smaller, scripts run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from vilmedic.datasets.decode import SUFFIXES
from vilmedic.errors import ConfigError, DataError
from vilmedic.files import walk_files
from vilmedic.preparation.download.archives import unpack
from vilmedic.preparation.download.space import SPARE
from vilmedic.preparation.download.table import Expected, Resource, Unpack
from vilmedic.preparation.resize import LEFT_OUT, UNREADABLE, resize_tree

DONE = ".complete"
_SCRIPT = re.compile(r"make_\w+")


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
    """Whether the images of an archive were all made smaller before."""
    if not step.archive:
        return False  # the tree is gone through again: it takes what is new
    note = target / DONE
    return note.is_file() and note.read_text() == _note(step, data)


def unpack_and_resize(step: Unpack, target: Path, data: Path, *, keep: bool, workers: int) -> None:
    """Make the images of an archive or a folder smaller, each once.

    Args:
        step: which.
        target: where the smaller images go.
        data: the data folder.
        keep: leave the unpacked originals; those that the user put in place always stay.
        workers: processes, 0 for one a core.
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
    print(f"{target}: {found.written:,} images written, {found.present:,} were there already")
    if found.unreadable:
        print(
            f"  {len(found.unreadable):,} images cannot be read; they are listed in "
            f"{target / UNREADABLE} and will be left out"
        )
    if found.left_out:
        print(
            f"  {len(found.left_out):,} files of other kinds are left out; they are listed in "
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
            f"All is fetched, and the last step failed (see above). Mend it and run: {shown}"
        )


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
