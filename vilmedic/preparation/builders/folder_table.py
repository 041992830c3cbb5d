"""Table rows and labels from CSV or JSON files."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vilmedic.datasets.lines import brief, shown
from vilmedic.errors import DataError
from vilmedic.files import DAMAGE
from vilmedic.log import counted
from vilmedic.preparation.splitting import SPLIT_NAMES
from vilmedic.tables import Missing, no_column, open_text, read_numbered, trimmed, unreadable

_JSON = (".json", ".jsonl", ".ndjson")
UNCERTAIN_CELLS = ("uncertain", "absent", "error")  # what -1 counts as in columns of 0 and 1
_WORDS = {"true": 1, "yes": 1, "y": 1, "false": 0, "no": 0, "n": 0}
_BETWEEN = re.compile(r"[,;|]")


@dataclass(frozen=True)
class Row:
    """A row of a table, or the header of a DICOM file.

    Attributes:
        where: `file:line` of a table, or the entry of a JSON list.
        values: of each column those that are not missing: one, or several out of a list in JSON or
            a header.
        path: of the DICOM file, relative to its folder.
        split: in which the table itself lists it; empty when it lists no splits.
        encoding: character set of a header that does not say it, found from the texts of all.
        doubtful: whether another character set is as likely.
    """

    where: str
    values: Mapping[str, list[str]] = field(default_factory=dict)
    path: str = ""
    split: str = ""
    encoding: str = ""
    doubtful: bool = False

    @property
    def place(self) -> str:
        """Where it is, without the folder of the file: the same wherever that lies."""
        return "" if self.path else os.path.basename(self.where)

    def text(self, column: str) -> str:
        """The values of a column as one text; empty without a column or a value."""
        return " ".join(self.values[column]) if column else ""


def read_rows(
    path: Path, columns: Sequence[str], missing: Missing, encoding: str = ""
) -> list[Row]:
    """The rows of a CSV file, of JSON lines, or of a JSON file (each may be compressed with gzip).

    A JSON file holds a list of objects, or lists named `train`, `val` and `test` as the
    `annotation.json` of report generation projects does.

    Args:
        path: the file.
        columns: names of the columns, or keys of the objects, to read.
        missing: which values count as missing; counts them.
        encoding: of the text; empty to find out.

    Raises:
        DataError: the file cannot be read or has no such column.
    """
    if not path.name.lower().removesuffix(".gz").endswith(_JSON):
        return [
            Row(
                f"{path}:{line}",
                {
                    name: [value] if value else []
                    for name, value in zip(columns, values, strict=True)
                },
            )
            for line, values in read_numbered(path, columns, missing, encoding)
        ]
    rows = []
    known: dict[str, None] = {}
    for where, split, content in _objects(path, encoding):
        known |= dict.fromkeys(content)
        values = {name: _texts(content.get(name), where, name, missing) for name in columns}
        rows.append(Row(where, values, split=split))
    if not rows:
        raise DataError(f"{path} holds no objects.")
    for name in columns:
        if name not in known:
            raise no_column(path, name, list(known))
    return rows


class LabelColumns:
    """The labels of the rows of any table.

    A column holds names, or is one of 0 and 1 when at least half of its values are 0, 1, -1, true,
    false, yes or no; its own name is then the label.

    Args:
        columns: to read.
        rows: of the table.
        missing: which parts of a list of names are missing.
        uncertain: what -1 counts as, one of `UNCERTAIN_CELLS`.
        no_label: label of a row with 1 in none of its columns, where all are of 0 and 1.

    Attributes:
        notes: what was counted.

    Raises:
        DataError: a column of 0 and 1 holds something else, or -1 that should be an error.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Row],
        missing: Missing,
        uncertain: str,
        no_label: str,
    ) -> None:
        self.missing, self.uncertain, self.no_label = missing, uncertain, no_label
        self.columns = columns
        self.numbers = {name for name in columns if _is_number_column(name, rows)}
        filled = {name for name in columns if any(row.values[name] for row in rows)}
        self.only_numbers = bool(self.numbers) and filled == self.numbers
        self.notes: dict[str, Any] = {}
        unsure: Counter[str] = Counter()
        for name in columns:
            if name in self.numbers:
                unsure[name] = self._check(name, rows)
        if +unsure:
            meaning = "counted as absent"
            if uncertain == "uncertain":
                meaning = "each a label of its own, 'uncertain' and the name"
            self.notes[f"values of -1, {meaning}"] = dict(+unsure)
        blank = sum(not any(row.values[name] for name in columns) for row in rows)
        if self.only_numbers and blank:
            self.notes[f"rows without a value in any label column, '{no_label}'"] = blank

    def of(self, row: Row) -> tuple[str, ...]:
        """The labels of a row; none when it names none."""
        found: list[str] = []
        for name in self.columns:
            values = row.values[name]
            if name not in self.numbers:
                parts = [trimmed(part) for value in values for part in _BETWEEN.split(value)]
                found += [part for part in parts if not self.missing.is_missing(part)]
                continue
            numbers = {_cell_number(value) for value in values}
            label = " ".join(_BETWEEN.sub(" ", name).split())
            if 1 in numbers:
                found.append(label)
            elif -1 in numbers and self.uncertain == "uncertain":
                found.append(f"uncertain {label}")
        if not found and self.only_numbers:
            return (self.no_label,)
        return tuple(dict.fromkeys(found))

    def _check(self, name: str, rows: Sequence[Row]) -> int:
        """How many values of a column are -1."""
        cells = [(row, value) for row in rows for value in row.values[name]]
        other = [(row, value) for row, value in cells if _cell_number(value) is None]
        if other:
            row, value = other[0]
            raise DataError(
                f"{row.where}: the column '{name}' holds '{brief(value)}', and mostly 0 and 1"
                f"{_further(other)}. Allowed are 0, 1, -1, true, false, yes, no and missing values "
                "(--missing says which texts count as such); names of labels belong into a column "
                "of their own."
            )
        unsure = [(row, value) for row, value in cells if _cell_number(value) == -1]
        if unsure and self.uncertain == "error":
            raise DataError(
                f"{unsure[0][0].where}: the column '{name}' holds -1{_further(unsure)}. Say with "
                f"--uncertain what it counts as: {', '.join(UNCERTAIN_CELLS[:2])}."
            )
        return len(unsure)


def _objects(path: Path, encoding: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The objects of a JSON file, each with its location and, if listed, its split."""
    try:
        with open_text(path, encoding) as file:
            first = next((line for line in file if line.strip()), "")
            # One object a line, unless the first line is the beginning of something longer.
            lined = not path.name.lower().removesuffix(".gz").endswith(".json")
            in_lines = first.lstrip().startswith("{") and _is_row(first, lined)
            file.seek(0)
            if in_lines:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        where = f"{path}:{number}"
                        yield where, "", _object(_parsed(line.rstrip("\r\n"), path, number), where)
                return
            content = _parsed(file.read(), path, 1)
    except (OSError, UnicodeDecodeError, *DAMAGE) as error:
        raise unreadable(path, error) from None
    if isinstance(content, list):
        for number, one in enumerate(content, start=1):
            where = f"{path}: entry {number}"
            yield where, "", _object(one, where)
        return
    if not _lists_splits(content):
        keys = shown([f"'{key}'" for key in content]) if isinstance(content, dict) else "no keys"
        raise DataError(
            f"{path} is JSON with {keys}, not a list of objects. Write one object a line (in "
            "pandas: to_json(path, orient='records', lines=True)), a list of objects, or lists "
            "named train, val and test."
        )
    for name, entries in content.items():
        for number, one in enumerate(entries, start=1):
            where = f"{path}: {name}, entry {number}"
            yield where, SPLIT_NAMES[name.lower()], _object(one, where)


def _is_row(line: str, lined: bool) -> bool:
    """Return whether the first line is a complete object; `lined`: the file name says so."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return lined
    return isinstance(content, dict) and not _lists_splits(content)


def _lists_splits(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(name.lower() in SPLIT_NAMES for name in content)
        and all(isinstance(entries, list) for entries in content.values())
        and all(isinstance(one, dict) for entries in content.values() for one in entries[:1])
    )


def _parsed(text: str, path: Path, line: int) -> Any:
    """The content of a JSON text that starts on a line of a file."""
    try:
        return json.loads(text.lstrip("\ufeff"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise DataError(
            f"{path}:{at} is not JSON: {error.msg} at character {error.colno}."
        ) from None
    except RecursionError:
        raise DataError(f"{path}:{line} is JSON of too many levels.") from None
    except ValueError as error:
        raise DataError(f"{path}:{line} is not JSON: {error}.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key '{brief(twice)}' twice")
    return found


def _object(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DataError(f"{where} is not a JSON object but {type(content).__name__}.")
    return content


def _texts(value: Any, where: str, name: str, missing: Missing) -> list[str]:
    """The values of a key that are not missing; a list without any counts as one missing value."""
    if not value and isinstance(value, list):
        missing.counts[name] += 1
    several = value if isinstance(value, list) else [value]
    texts = []
    for one in several:
        if isinstance(one, dict | list):
            raise DataError(
                f"{where}: '{name}' holds {'an object' if isinstance(one, dict) else 'lists'}; a "
                "text, a number or a list of them is expected."
            )
        nothing = one is None or (isinstance(one, float) and math.isnan(one))
        text = missing.text("" if nothing else str(one), name)
        if not text.isascii() and _broken(text):
            raise DataError(f"{where}: '{name}' holds half a character (a lone surrogate).")
        if text:
            texts.append(text)
    return texts


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_number_column(name: str, rows: Sequence[Row]) -> bool:
    values = [value for row in rows for value in row.values[name]]
    known = sum(_cell_number(value) is not None for value in values)
    return bool(values) and 2 * known >= len(values)


def _cell_number(value: str) -> int | None:
    """1, 0 or -1 in any way of writing them; None for all else."""
    word = value.lower()
    if word in _WORDS:
        return _WORDS[word]
    try:
        number = float(word)
    except ValueError:
        return None
    return int(number) if number in (0, 1, -1) else None


def _further(cells: Sequence[object]) -> str:
    return f" (and {counted(len(cells) - 1, 'more such cell')})" if len(cells) > 1 else ""
