"""Embedding files: a row per input, written in parts so that killed runs resume."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from vilmedic.checkpoints.run_directory import acquire
from vilmedic.datasets.lines import listed
from vilmedic.errors import DataError
from vilmedic.files import replacing

PART = 1024
"""Inputs per part: the most that a killed run loses."""
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Column:
    """Inputs of one kind and the function that embeds them.

    Args:
        name: the array of the file: `visual` or `linguistic`.
        key: the array of the inputs themselves: `path` or `text`.
        inputs: the inputs, as text.
        embed: returns float32 [n, D] and an error per input (empty without one) for the inputs
            from start to stop. A row with an error holds nan.
        batch: inputs per batch; parts consist of whole batches, so that a resumed run gives the
            same bits as an uninterrupted one.
    """

    name: str
    key: str
    inputs: Sequence[str]
    embed: Callable[[int, int], tuple[Rows, list[str]]]
    batch: int

    @property
    def part(self) -> int:
        """Inputs of a part."""
        return max(1, PART // self.batch) * self.batch

    def starts(self) -> range:
        """The number of the first input of each part."""
        return range(0, len(self.inputs), self.part)


def write_embeddings(
    out: Path,
    columns: Sequence[Column],
    plan: dict[str, Any],
    *,
    force: bool = False,
    allow_errors: bool = True,
    on_kept: Callable[[int], object] = lambda _size: None,
) -> bool:
    """Write the embeddings of inputs, resuming an earlier call with the same plan.

    The file holds, of each column, the embeddings float32 [N, D], the inputs [N] and `<key>_error`
    [N]: the reason why an input has no embedding, or an empty text. `.npz` files load with
    `numpy.load` and hold the plan as the JSON text `plan`; `.parquet` files hold one column.

    Args:
        out: the file, `.npz` or `.parquet`.
        columns: the inputs.
        plan: everything that the result depends on: checkpoint, options, inputs. Another plan
            starts from the beginning.
        force: replace a file with another plan, or with errors.
        allow_errors: whether inputs left out by an earlier call may stay so. If not, they are an
            error in a finished file, and are embedded again in a part.
        on_kept: called with the number of inputs of each part from an earlier call.

    Returns:
        Whether anything was done.

    Raises:
        DataError: another process is writing this file; it exists with another plan or with errors
            that are not allowed; or it cannot be written.
    """
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    plan = {**plan, "sha256": digest}
    folder = out.with_name(f".{out.name}.parts-{digest[:16]}")  # a folder per plan

    def is_done() -> bool:
        errors = _errors(out, columns, digest)
        if errors and not (allow_errors or force):
            left_out = listed(errors, "input").rstrip(".")
            raise DataError(
                f"{out} is complete, but an earlier call left out {left_out}. --force embeds all "
                "inputs again; --on-error skip leaves the file as it is."
            )
        return errors is not None and not (errors and force)

    if is_done():
        return False
    with _locked(out):
        if is_done():
            return False
        if out.exists() and not force:
            raise DataError(
                f"{out} is there already, and made from other inputs, weights or options. "
                "Give another name, or --force to replace it."
            )
        with _writing(out, folder):
            for other in out.parent.glob(f".{glob.escape(out.name)}.parts-*"):
                if other != folder:
                    shutil.rmtree(other)
            folder.mkdir(exist_ok=True)
        try:
            for column in columns:
                for start in column.starts():
                    stop = min(start + column.part, len(column.inputs))
                    if _is_part(_part_path(folder, column, start), allow_errors):
                        on_kept(stop - start)
                    else:
                        _make_part(out, folder, column, start, stop)
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # it stays when there is a part in it
            raise
        with _writing(out, folder):
            write = _write_parquet if out.suffix == ".parquet" else _write_npz
            with replacing(out, sync=True) as draft:
                write(draft, folder, columns, plan)
            shutil.rmtree(folder)
    return True


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock a file against other processes, and make its folder.

    Raises:
        DataError: another process is writing it, or its folder is not writable.
    """
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would survive a kill
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab"):  # filelock treats an unwritable folder as a held lock
            pass
        while True:
            held = acquire(lock, 0)
            if not held or path.exists():
                break
            lock.release()  # another process has just removed the file
    except Timeout:
        raise DataError(f"{out} is being written by another process.") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"No file can be written in {out.parent.absolute()}: {reason}.") from error
    try:
        yield
    finally:
        if held:
            with contextlib.suppress(OSError):
                path.unlink()
            lock.release()


@contextmanager
def _writing(out: Path, folder: Path) -> Iterator[None]:
    """Explain what is kept if the disk is full."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}. What is complete is kept in "
            f"{folder}: the same command continues."
        ) from error


def _make_part(out: Path, folder: Path, column: Column, start: int, stop: int) -> None:
    path = _part_path(folder, column, start)
    rows, errors = column.embed(start, stop)
    with (
        _writing(out, folder),
        replacing(path, sync=True) as draft,
        open(draft, "wb") as file,
    ):
        np.savez(file, rows=rows, errors=np.array(errors, dtype=np.str_))


def _is_part(path: Path, allow_errors: bool) -> bool:
    """Return whether a part exists and is usable."""
    try:
        with np.load(path, allow_pickle=False) as part:
            return allow_errors or not any(part["errors"].tolist())
    except (OSError, ValueError, LookupError, zipfile.BadZipFile):
        return False


def _part_path(folder: Path, column: Column, start: int) -> Path:
    return folder / f"{column.name}-{start:09d}.npz"


def _parts(folder: Path, column: Column) -> Iterator[tuple[Rows, list[str]]]:
    for start in column.starts():
        with np.load(_part_path(folder, column, start), allow_pickle=False) as part:
            yield part["rows"], part["errors"].tolist()


def _write_npz(path: Path, folder: Path, columns: Sequence[Column], plan: dict[str, Any]) -> None:
    """Join all parts into one file, holding only one of them at a time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for column in columns:
            errors: list[str] = []
            with archive.open(f"{column.name}.npy", "w", force_zip64=True) as file:
                for number, (rows, wrong) in enumerate(_parts(folder, column)):
                    if not number:
                        shape = (len(column.inputs), rows.shape[1])
                        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(rows.astype("<f4", copy=False).tobytes())
                    errors += wrong
            _add_texts(archive, column.key, column.inputs)
            _add_texts(archive, f"{column.key}_error", errors)
        _add_texts(archive, "plan", json.dumps(plan))


def _add_texts(archive: zipfile.ZipFile, name: str, texts: Sequence[str]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.array(texts, dtype=np.str_), allow_pickle=False)


def _write_parquet(
    path: Path, folder: Path, columns: Sequence[Column], plan: dict[str, Any]
) -> None:
    """Join all parts into one file, with a row group per part."""
    import pyarrow as arrow
    from pyarrow import parquet

    (column,) = columns
    writer: Any = None
    for start, (rows, errors) in zip(column.starts(), _parts(folder, column), strict=True):
        flat = arrow.array(rows.ravel(), type=arrow.float32())
        table = arrow.table(
            {
                column.key: arrow.array(column.inputs[start : start + len(rows)]),
                f"{column.key}_error": arrow.array(errors),
                column.name: arrow.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
            }
        ).replace_schema_metadata({"plan": json.dumps(plan)})
        if writer is None:
            writer = parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def _errors(out: Path, columns: Sequence[Column], digest: str) -> list[str] | None:
    """Return the inputs left out of the finished file of a plan; None if it is not finished."""
    try:
        if out.suffix == ".parquet":
            from pyarrow import parquet

            read: Any = parquet.read_table(out, columns=[f"{one.key}_error" for one in columns])
            text = (read.schema.metadata or {}).get(b"plan", b"{}").decode()
            reasons = [read[f"{one.key}_error"].to_pylist() for one in columns]
        else:
            with np.load(out, allow_pickle=False) as arrays:
                text = str(arrays["plan"])
                reasons = [arrays[f"{one.key}_error"].tolist() for one in columns]
        plan = json.loads(text)
    except Exception:  # no file, or a damaged or foreign one
        return None
    if not isinstance(plan, dict) or plan.get("sha256") != digest:
        return None
    return [reason for column in reasons for reason in column if reason]
