"""Start of scripts and commands: Python version check and argument parser.

Scripts import this module before any other of the package.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from vilmedic.errors import INTERRUPTED

CLONE = Path(__file__).resolve().parent.parent
PYTHON = (3, 10)
WIDEST = 100
"""Most columns of help."""
MODULES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "omegaconf": "omegaconf",
    "pyyaml": "yaml",
    "griffelib": "griffe",
    "numpy": "numpy",
    "scipy": "scipy",
    "filelock": "filelock",
    "scikit-learn": "sklearn",
    "threadpoolctl": "threadpoolctl",
    "umap-learn": "umap",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "simplejpeg": "simplejpeg",
    "numba": "numba",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
    "plotly": "plotly",
    "jinja2": "jinja2",
    "httpx2": "httpx2",
    "charset-normalizer": "charset_normalizer",
}
"""The module of each package that pyproject.toml requires."""


def run(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit status of a script's main function."""
    sys.exit(main())


class _Help(argparse.HelpFormatter):
    """Help of at most 100 columns, which names each default that says something."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size((WIDEST, 24)).columns
        super().__init__(prog, max_help_position=28, width=max(60, min(WIDEST, columns)))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.nargs == 0 or action.default in (None, "", [], argparse.SUPPRESS)
        stated = "(default" in text or "by default" in text
        if silent or stated or not action.option_strings or action.const:
            return text
        return f"{text} (default: %(default)s)"


def argument_parser(description: str, **options: Any) -> argparse.ArgumentParser:
    """A parser whose help looks like that of all commands.

    Args:
        description: what the command does; of several paragraphs the first is shown.
        options: other arguments of `argparse.ArgumentParser`.
    """
    text = " ".join(description.strip().split("\n\n")[0].split())
    return argparse.ArgumentParser(description=text, formatter_class=_Help, **options)


def count(text: str) -> int:
    """An argument that is an integer >= 0."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """An argument that is an integer >= 1."""
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: integer >= {least}")
    return int(text)


def _lacks() -> str:
    """Reason why scripts cannot run on this Python, as a sentence; empty if they can."""
    if sys.version_info < PYTHON:
        return f"vilmedic needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}."
    missing = [name for name, module in MODULES.items() if find_spec(module) is None]
    if not missing:
        return ""
    return (
        f"{sys.executable} lacks packages that vilmedic needs ({', '.join(missing)}): run `make "
        f"setup` in {CLONE} and use {CLONE / '.venv' / 'bin' / 'python'}, or install the clone "
        f"with `{sys.executable} -m pip install {CLONE}`."
    )


def _interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print one line for Ctrl-C while a script is still importing; other errors as usual."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)  # otherwise Python ends by the signal, without an exit status


sys.excepthook = _interrupted
if _reason := _lacks():
    print(_reason, file=sys.stderr)
    sys.exit(2)
