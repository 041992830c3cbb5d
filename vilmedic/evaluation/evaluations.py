"""Evaluation folders of a run: one per evaluation, and an index of all.

`<run directory>/evaluations/<what>-<8 hex>/` belongs to one evaluation: `what` is its checkpoint or
mode, and the digits are a hash of everything that its numbers depend on. `evaluation.json` in it
lists these settings, and `evaluations/index.json` the evaluations of a run. The newest results of
each split are copied into the run directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vilmedic.checkpoints.left_out import LeftOut, read_json
from vilmedic.evaluation.predictions import predictions_name
from vilmedic.evaluation.results import headline, results_name, write_results
from vilmedic.files import plain_name, replace_bytes, replace_text
from vilmedic.loggers.contract import flat

logger = logging.getLogger(__name__)

FOLDER = "evaluations"
INDEX = "index.json"
RECORD = "evaluation.json"
EARLIER = "earlier"


class EvaluationFolder:
    """Folder of an evaluation.

    Args:
        run_dir: the directory of the run.
        what: the checkpoint or the mode.
        ema: whether averaged weights are evaluated.
        settings: everything that its numbers and figures depend on, as JSON values.
        about: further fields of its entry in the index.
    """

    def __init__(
        self,
        run_dir: Path,
        what: str,
        *,
        ema: bool,
        settings: dict[str, Any],
        about: dict[str, Any],
    ) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        digits = hashlib.sha256(text.encode()).hexdigest()[:8]
        what = re.sub(r"[^\w.+-]+", "_", what)
        self.name = f"{what}{'-ema' if ema else ''}-{digits}"
        self.run_dir, self.path = run_dir, run_dir / FOLDER / self.name
        self._record: dict[str, Any] = {
            "folder": self.name,
            "what": what,
            "ema": ema,
            "configuration": digits,
            **about,
            "settings": json.loads(text),
        }

    def write(self, results: dict[str, Any]) -> Path:
        """Write the results of a split, their copy in the run directory, and the index.

        Args:
            results: the results of `Ensemblor.start` for a split.

        Returns:
            The file in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = write_results(results, self.path)
        _keep_earlier(self.run_dir, path.name)
        replace_text(self.run_dir / path.name, path.read_text(encoding="utf-8"))
        self.note()
        return path

    def write_predictions(self, split: str, content: bytes) -> Path:
        """Write the predictions of a split, and their copy in the run directory.

        Returns:
            The file in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / predictions_name(split)
        for place in (path, self.run_dir / path.name):
            replace_bytes(place, content)
        return path

    def note(self) -> None:
        """Describe the folder in `evaluation.json` and in the index."""
        self.path.mkdir(parents=True, exist_ok=True)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _write_json(self.path / RECORD, {**self._record, "date": date})
        write_index(self.run_dir)


def _keep_earlier(run_dir: Path, name: str) -> None:
    """Move results that were written before evaluations had folders to `evaluations/earlier`."""
    path = run_dir / name
    try:
        known = "evaluation" in read_json(path)
    except (OSError, ValueError, TypeError, RecursionError):
        return
    kept = run_dir / FOLDER / EARLIER / name
    if not known and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, kept)
        logger.info("Kept: %s", kept)


def write_index(run_dir: Path) -> Path:
    """Write `evaluations/index.json` from the folders of the evaluations, oldest first.

    Each entry holds the checkpoints, the date, the headline numbers of each split, and under
    `differs` the settings that not all evaluations of the run have in common.
    """
    path = run_dir / FOLDER / INDEX
    _write_json(path, _gathered(run_dir, LeftOut(run_dir, what="the index")))
    return path


def _gathered(run_dir: Path, left_out: LeftOut) -> list[dict[str, Any]]:
    """The entries of the index, from the folders."""
    records = []
    for path in (run_dir / FOLDER).glob(f"*/{RECORD}"):
        with left_out.damaged(path):
            record = read_json(path)
            order = (str(record["date"]), str(record["folder"]))
            settings = dict(flat(record.pop("settings")))
            records.append((order, record, settings, _numbers(path.parent)))
    records.sort(key=lambda one: one[0])
    every = [settings for _, _, settings, _ in records]
    keys = dict.fromkeys(key for settings in every for key in settings)
    own = [
        key
        for key in keys
        if not key.startswith("checkpoints") and any(s.get(key) != every[0].get(key) for s in every)
    ]
    return [
        {**record, "differs": {key: settings.get(key) for key in own}, "numbers": numbers}
        for _, record, settings, numbers in records
    ]


def read_index(run_dir: Path, left_out: LeftOut | None = None) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first; none without an index.

    An unreadable index is replaced by the descriptions in the folders.

    Args:
        run_dir: the directory of the run.
        left_out: gets an unreadable index, and damaged entries.
    """
    left_out = left_out or LeftOut(run_dir)
    path = run_dir / FOLDER / INDEX
    if not os.path.lexists(path):
        return []
    content: Any = None
    with left_out.damaged(path):
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError("it holds no list")
    entries = []
    for number, entry in enumerate(
        content if isinstance(content, list) else _gathered(run_dir, left_out), start=1
    ):
        if reason := _odd(entry, run_dir):
            left_out.add(path, f"entry {number}: {reason}")
        else:
            entries.append(entry)
    return entries


def _odd(entry: Any, run_dir: Path) -> str:
    """Return what is wrong with an entry of the index; empty if nothing is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("folder"), str):
        return "it names no folder"
    try:
        folder = run_dir / FOLDER / plain_name(entry["folder"])
    except ValueError as error:
        return f"its folder: {error}"
    if not folder.is_dir():
        return f"there is no folder {entry['folder']}"
    if not isinstance(entry.get("numbers", {}), dict):
        return "its numbers are no mapping"
    return ""


def shown_folders(run_dir: Path, left_out: LeftOut | None = None) -> list[Path]:
    """Return the folders whose images a page shows: of the newest results and images."""
    newest: dict[str, str] = {}
    for entry in read_index(run_dir, left_out):
        kinds = ["generated"] if entry.get("generated") else entry.get("numbers", {})
        newest |= dict.fromkeys(kinds, entry["folder"])
    return [run_dir / FOLDER / name for name in dict.fromkeys(newest.values())]


def _numbers(folder: Path) -> dict[str, Any]:
    """The headline numbers of each split, of the model and of the baselines."""
    found = {}
    for path in sorted(folder.glob(results_name("*"))):
        results = read_json(path)
        systems = {"model": results, **results["baselines"]}
        found[results["split"]] = {name: headline(one) for name, one in systems.items()}
    return found


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_text(path, text, writer=f".{os.getpid()}")  # of two evaluations at a time, say
