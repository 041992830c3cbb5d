"""The folder of a run: its seeds, its configuration and what it was run with."""

from __future__ import annotations

import json
import platform
import re
import secrets
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilmedic.errors import ConfigError
from vilmedic.executors.checkpoint import last_name
from vilmedic.executors.log import LOGGER
from vilmedic.files import replace_text

if TYPE_CHECKING:
    from vilmedic.config.load import Config

PACKAGES = ("vilmedic", "torch", "torchvision", "transformers", "tokenizers", "omegaconf", "numpy")


def make_run_directory(run_dir: Path) -> None:
    """Make the folder of a run, and those above it.

    Raises:
        ConfigError: there is a file in its place or above it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"ckpt_dir: the folder {run_dir} cannot be made: {error.strerror}. Name another folder "
            "with ckpt_dir."
        ) from error


def used_seeds(run_dir: Path) -> set[int]:
    """The seeds of all runs that left something in a run directory."""
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    found = [re.fullmatch(r"(?:config|last)_(\d+)\.(?:yml|pth)", name) for name in names]
    return {int(match[1]) for match in found if match is not None}


def unsaved_seed(run_dir: Path) -> int | None:
    """The seed of the newest run that ended before it saved anything; None without one."""
    begun = [
        path
        for path in run_dir.glob("config_*.yml")
        if (match := re.fullmatch(r"config_(\d+)\.yml", path.name))
        and not (run_dir / last_name(int(match[1]))).exists()
    ]
    newest = max(begun, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if newest is None else int(newest.stem.removeprefix("config_"))


def choose_seed(run_dir: Path, wanted: int | None) -> int:
    """The seed of a new run: the one asked for, or a fresh one.

    Raises:
        ConfigError: a run with this seed is already there.
    """
    used = used_seeds(run_dir)
    if wanted is None:
        return next(
            seed for seed in iter(lambda: secrets.randbelow(1_000_000), None) if seed not in used
        )
    if wanted in used and (run_dir / last_name(wanted)).exists():
        raise ConfigError(
            f"trainor.seed: {run_dir} already holds a run with seed {wanted}. Continue it with "
            f"ckpt={last_name(wanted)}, or give another seed or another name."
        )
    return wanted


def describe_environment(config: Config, seed: int, device: str) -> dict[str, Any]:
    """What is needed to repeat a run: command, overrides, versions, commit, device."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": sys.argv,
        "overrides": list(config.overrides),
        "seed": seed,
        "device": device,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the code that runs, with `-dirty` when files differ; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def write_provenance(config: Config, run_dir: Path, seed: int, device: str) -> None:
    """Write `config_<seed>.yml` and `environment_<seed>.json` into the run directory.

    A disk that is full is a warning; the files of before stay.
    """
    environment = json.dumps(describe_environment(config, seed, device), indent=2)
    texts = {f"config_{seed}.yml": config.to_yaml(), f"environment_{seed}.json": environment + "\n"}
    for name, text in texts.items():
        try:
            replace_text(run_dir / name, text)
        except OSError as error:
            LOGGER.warning("%s could not be written: %s", run_dir / name, error)
