from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from vilmedic.embedding_file import Column, write_embeddings
from vilmedic.errors import DataError

PLAN = {"checkpoint": "a", "batch": 4}
WIDTH = 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vilmedic.embedding_file.PART", 8)


def column(
    count: int = 30, name: str = "visual", key: str = "path", seen: Any = None, stop: int = 10**9
) -> Column:
    """Inputs whose embeddings contain their index; embedding fails at `stop`."""

    def embed(start: int, end: int) -> tuple[Any, list[str]]:
        if start >= stop:
            raise KeyboardInterrupt
        if seen is not None:
            seen.append((start, end))
        numbers = np.arange(start, end, dtype=np.float32)
        rows = np.stack([numbers + place / 7 for place in range(WIDTH)], axis=1)
        rows[numbers == 5] = np.nan
        return rows, ["cut short" if number == 5 else "" for number in numbers]

    return Column(name, key, [f"{number}.png" for number in range(count)], embed, batch=4)


def check(arrays: Any, count: int = 30) -> None:
    assert arrays["path"].tolist() == [f"{number}.png" for number in range(count)]
    assert arrays["visual"].dtype == np.float32
    assert arrays["visual"].shape == (count, WIDTH)
    assert arrays["visual"][7, 0] == 7
    assert np.isnan(arrays["visual"][5]).all()
    assert arrays["path_error"].tolist() == ["cut short" if n == 5 else "" for n in range(count)]


def test_a_row_for_each_input(tmp_path: Path) -> None:
    out = tmp_path / "new" / "features.npz"
    texts = column(9, "linguistic", "text")
    assert write_embeddings(out, [column(), texts], PLAN)
    with np.load(out, allow_pickle=False) as arrays:
        check(arrays)
        assert len(arrays["linguistic"]) == len(arrays["text"]) == 9
    assert [path.name for path in out.parent.iterdir()] == ["features.npz"]
    before = out.stat().st_mtime_ns
    assert not write_embeddings(out, [column(stop=0), texts], PLAN)
    assert out.stat().st_mtime_ns == before


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    out = tmp_path / "features.parquet"
    assert write_embeddings(out, [column()], PLAN)
    table = parquet.read_table(out)
    rows = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    check(rows | {"visual": rows["visual"].astype(np.float32)})
    assert not write_embeddings(out, [column(stop=0)], PLAN)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_resumes_after_an_interruption(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    write_embeddings(whole, [column()], PLAN)
    for stop in (8, 16):
        with pytest.raises(KeyboardInterrupt):
            write_embeddings(cut, [column(stop=stop)], PLAN)
        assert not cut.exists()
    seen: list[tuple[int, int]] = []
    kept: list[int] = []
    write_embeddings(cut, [column(seen=seen)], PLAN, on_kept=kept.append)
    assert (kept, seen) == ([8, 8], [(16, 24), (24, 30)])
    assert cut.read_bytes() == whole.read_bytes()


def test_another_plan_starts_again_and_overwriting_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(out, [column(stop=16)], PLAN)
    seen: list[tuple[int, int]] = []
    other = PLAN | {"checkpoint": "b"}
    write_embeddings(out, [column(seen=seen)], other)
    assert seen[0] == (0, 8)
    with pytest.raises(DataError, match="--force"):
        write_embeddings(out, [column()], PLAN)
    assert write_embeddings(out, [column()], PLAN, force=True)


def test_completed_parts_survive_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at a random part; the same call resumes."""
    import os

    real: Callable[..., None] = os.replace
    left = random.Random(3).randrange(2, 4)

    def refuse(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        real(source, target)

    out = tmp_path / "features.npz"
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DataError, match="the same command continues"):
        write_embeddings(out, [column()], PLAN)
    monkeypatch.undo()
    monkeypatch.setattr("vilmedic.embedding_file.PART", 8)
    assert write_embeddings(out, [column()], PLAN)
    with np.load(out, allow_pickle=False) as arrays:
        check(arrays)


def fixed(count: int = 30, seen: Any = None) -> Column:
    """The inputs of `column`, without the one that fails."""
    whole = column(count, seen=seen)

    def embed(start: int, end: int) -> tuple[Any, list[str]]:
        rows, errors = whole.embed(start, end)
        return np.nan_to_num(rows), [""] * len(errors)

    return Column(whole.name, whole.key, whole.inputs, embed, batch=4)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_skipped_inputs_are_an_error_where_none_are_allowed(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"features{suffix}"
    write_embeddings(out, [column()], PLAN)
    before = out.read_bytes()
    assert not write_embeddings(out, [column(stop=0)], PLAN)
    with pytest.raises(DataError, match=r"an earlier call left out 1 input: cut short\. --force"):
        write_embeddings(out, [fixed()], PLAN, allow_errors=False)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(out, [column(stop=0)], PLAN, allow_errors=False, force=True)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert write_embeddings(out, [fixed()], PLAN, allow_errors=False, force=True)
    assert out.read_bytes() != before
    assert not write_embeddings(out, [column(stop=0)], PLAN, allow_errors=False)


def test_parts_with_skipped_inputs_are_computed_again(tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(out, [column(stop=16)], PLAN)
    seen: list[tuple[int, int]] = []
    write_embeddings(out, [fixed(seen=seen)], PLAN, allow_errors=False)
    assert seen == [(0, 8), (16, 24), (24, 30)]
    with np.load(out) as arrays:
        assert not any(arrays["path_error"].tolist())


def test_damaged_parts_are_computed_again(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "features.npz"
    write_embeddings(whole, [column()], PLAN)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(out, [column(stop=16)], PLAN)
    first, _ = sorted(tmp_path.glob(".features.npz.parts-*/*.npz"))
    first.write_bytes(first.read_bytes()[:100])
    write_embeddings(out, [column()], PLAN)
    assert out.read_bytes() == whole.read_bytes()


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    """The second call is refused and changes nothing; the first one completes."""
    whole, out = tmp_path / "whole.npz", tmp_path / "features.npz"
    write_embeddings(whole, [column()], PLAN)
    plain = column()
    tried = 0

    def embed(start: int, end: int) -> tuple[Any, list[str]]:
        nonlocal tried
        for plan in (PLAN, PLAN | {"checkpoint": "b"}):
            with pytest.raises(DataError, match="is being written by another process"):
                write_embeddings(out, [column()], plan, force=True)
            tried += 1
        return plain.embed(start, end)

    write_embeddings(out, [Column(plain.name, plain.key, plain.inputs, embed, batch=4)], PLAN)
    assert tried == 8
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, out.name}


def test_a_read_only_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    out = tmp_path / "new" / "features.npz"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        with pytest.raises(DataError, match=rf"No file can be written in {out.parent}: Read-only"):
            write_embeddings(out, [column(stop=0)], PLAN)
    write_embeddings(out, [column()], PLAN)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        assert not write_embeddings(out, [column(stop=0)], PLAN)  # nothing to write
