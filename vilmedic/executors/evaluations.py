"""The evaluations of a run: a folder each, so that none overwrites another, and an index of all.

`<run directory>/evaluations/<what>-<8 hex>/` belongs to one evaluation: `what` is its checkpoint or
its mode, and the digits come from all that its numbers depend on. `evaluation.json` in it says what
that is, and `evaluations/index.json` lists the evaluations of a run. The results of the newest one
of each split are copied into the run directory.
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

from vilmedic.executors.results import headline, results_name, write_results
from vilmedic.files import replace_text
from vilmedic.loggers.contract import flat

logger = logging.getLogger(__name__)

FOLDER = "evaluations"
INDEX = "index.json"
RECORD = "evaluation.json"
EARLIER = "earlier"


class EvaluationFolder:
    """Where an evaluation is written.

    Args:
        run_dir: the directory of the run.
        what: the checkpoint or the mode.
        ema: whether averaged weights are evaluated.
        settings: what its numbers and pictures depend on, as values that JSON can hold.
        about: what the index says of it besides.
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
            results: what `Ensemblor.start` returns for a split.

        Returns:
            The file in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = write_results(results, self.path)
        _keep_earlier(self.run_dir, path.name)
        replace_text(self.run_dir / path.name, path.read_text(encoding="utf-8"))
        self.note()
        return path

    def note(self) -> None:
        """Say in `evaluation.json` and in the index what the folder holds."""
        self.path.mkdir(parents=True, exist_ok=True)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _write_json(self.path / RECORD, {**self._record, "date": date})
        write_index(self.run_dir)


def _keep_earlier(run_dir: Path, name: str) -> None:
    """Move results that were written before evaluations had folders to `evaluations/earlier`."""
    path = run_dir / name
    try:
        known = "evaluation" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return
    kept = run_dir / FOLDER / EARLIER / name
    if not known and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, kept)
        logger.info("Kept: %s", kept)


def write_index(run_dir: Path) -> Path:
    """Write `evaluations/index.json` from what the folders of the evaluations say, oldest first.

    Each entry tells the checkpoints, the date, the headline numbers of each split, and under
    `differs` the settings that not all evaluations of the run have in common.
    """
    records = []
    for path in (run_dir / FOLDER).glob(f"*/{RECORD}"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records.append((record, dict(flat(record.pop("settings"))), _numbers(path.parent)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is left out of the index: %s", path, error)
    records.sort(key=lambda one: (one[0]["date"], one[0]["folder"]))
    every = [settings for _, settings, _ in records]
    keys = dict.fromkeys(key for settings in every for key in settings)
    own = [
        key
        for key in keys
        if not key.startswith("checkpoints") and any(s.get(key) != every[0].get(key) for s in every)
    ]
    entries = [
        {**record, "differs": {key: settings.get(key) for key in own}, "numbers": numbers}
        for record, settings, numbers in records
    ]
    path = run_dir / FOLDER / INDEX
    _write_json(path, entries)
    return path


def read_index(run_dir: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first; none when there is no index that can be read."""
    try:
        content = json.loads((run_dir / FOLDER / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", run_dir / FOLDER / INDEX, error)
        return []
    return content if isinstance(content, list) else []


def shown_folders(run_dir: Path) -> list[Path]:
    """The folders whose pictures a page shows: of the newest results, and of the newest images."""
    newest: dict[str, str] = {}
    for entry in read_index(run_dir):
        kinds = ["generated"] if entry.get("generated") else entry.get("numbers", {})
        newest |= {kind: str(entry["folder"]) for kind in kinds}
    return [run_dir / FOLDER / name for name in dict.fromkeys(newest.values())]


def _numbers(folder: Path) -> dict[str, Any]:
    """The headline numbers of each split, of the model and of the baselines."""
    found = {}
    for path in sorted(folder.glob(results_name("*"))):
        results = json.loads(path.read_text(encoding="utf-8"))
        systems = {"model": results, **results["baselines"]}
        found[results["split"]] = {name: headline(one) for name, one in systems.items()}
    return found


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_text(path, text, writer=f".{os.getpid()}")  # of two evaluations at a time, say
