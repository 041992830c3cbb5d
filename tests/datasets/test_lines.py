from __future__ import annotations

import os
import re
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilmedic.datasets.lines import (
    Lines,
    brief,
    check_aligned,
    join_names,
    listed,
    read_lines,
    shown,
    split_names,
)
from vilmedic.errors import DataError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_reads_text_of_every_line(tmp_path: Path) -> None:
    write(tmp_path / "train.report.tok", "\ufeffKlein, größer\r\nb\x0cb\u2028c\n d ".encode())
    lines = read_lines(tmp_path, "train", "report.tok")
    assert list(lines) == ["Klein, größer", "b\x0cb\u2028c", "d"]
    assert lines.where(2) == f"{tmp_path}/train.report.tok:3"


def test_index_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        Lines(["a"], tmp_path)[1]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.reports.tok", b"a\n")
    with pytest.raises(DataError, match=r"Did you mean 'train\.reports\.tok'\?"):
        read_lines(tmp_path, "train", "report.tok")


def test_missing_file_lists_the_folder_when_nothing_is_near(tmp_path: Path) -> None:
    write(tmp_path / "zzz.csv", b"a\n")
    with pytest.raises(DataError, match=r"The folder holds zzz\.csv"):
        read_lines(tmp_path, "train", "report.tok")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    folder = re.escape(str(tmp_path))
    with pytest.raises(DataError, match=rf"there is no folder {folder}/nowhere\. .*docs/data\.md"):
        read_lines(tmp_path / "nowhere", "train", "report.tok")


def test_empty_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train.a.tok", b"")
    with pytest.raises(DataError, match=r"train\.a\.tok is empty"):
        read_lines(tmp_path, "train", "a.tok")


def test_all_empty_lines_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    write(tmp_path / "train.a.tok", b"x\n\n \nx\n\n\n\n\n")
    expected = r"6 empty lines: \S+:2, \S+:3, \S+:5, \S+:6, \S+:7 and 1 more"
    with pytest.raises(DataError, match=expected):
        read_lines(tmp_path, "train", "a.tok")


def test_line_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train.a.tok", b"fine\nna\xefve\n")
    with pytest.raises(DataError, match=r"train\.a\.tok:2 is not UTF-8 text: byte 0xef"):
        read_lines(tmp_path, "train", "a.tok")


def test_different_numbers_of_lines_name_both_files_and_counts(tmp_path: Path) -> None:
    images = Lines(["a", "b"], tmp_path / "train.image.tok")
    reports = Lines(["a"], tmp_path / "train.report.tok")
    expected = r"train\.image\.tok has 2 lines and \S+train\.report\.tok has 1"
    with pytest.raises(DataError, match=expected):
        check_aligned([images, reports])
    check_aligned([images, images])


def test_listed() -> None:
    assert listed(["a"], "line") == "1 line: a"
    assert listed(list("abcdefg"), "line") == "7 lines: a, b, c, d, e and 2 more"


@pytest.mark.parametrize("split", ["../train", "a/../../train", "/train", "", "a\x00b"])
def test_split_names_with_paths_are_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match="no name of a split"):
        read_lines(tmp_path, split, "report.tok")


def test_pipes_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.report.tok").mkdir()
    os.mkfifo(tmp_path / "test.report.tok")
    for split in ("train", "test"):
        with pytest.raises(DataError, match="not a file"):
            read_lines(tmp_path, split, "report.tok")


def test_names_with_commas_are_quoted() -> None:
    assert split_names("a.png, b c.png,,d.png ") == ["a.png", "b c.png", "d.png"]
    assert split_names('"scan, left.png",b.png') == ["scan, left.png", "b.png"]
    assert split_names('a"b.png,5" scan.png') == ['a"b.png', '5" scan.png']
    assert join_names(["scan, left.png", "b.png", 'a"b.png']) == '"scan, left.png",b.png,a"b.png'


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from('," \t')))
        .map("".join)
        .filter(lambda name: name and "\n" not in name),
        min_size=1,
    )
)
def test_any_names_survive_a_round_trip(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = f"{join_names(names)}\n{join_names(names)}\n"
        write(Path(folder) / "train.image.tok", content.encode())
        lines = read_lines(folder, "train", "image.tok")
        assert [split_names(line) for line in lines] == [names, names]


def test_long_texts_are_shortened_in_messages() -> None:
    assert brief("one\n two\tthree") == "one two three"
    assert len(brief("word " * 999)) == 400
    assert brief(b"scan\xe9.png".decode(errors="surrogateescape")) == "scan\\udce9.png"
    assert shown([f"c{n}" for n in range(99)]) == "c0, c1, c2, c3, c4 and 94 more"


def test_a_file_is_in_memory_at_most_once(tmp_path: Path) -> None:
    text = "No focal consolidation, effusion or pneumothorax; the heart is of normal size.\n"
    (tmp_path / "train.report.tok").write_text(text * 70_000)
    tracemalloc.start()
    lines = read_lines(tmp_path, "train", "report.tok")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(lines) == 70_000
    assert sum(line == text.strip() for line in lines) == 70_000
    assert lines[69_999] == text.strip()
    assert peak < 1.6 * len(text) * 70_000


@pytest.mark.parametrize(
    ("content", "count"),
    [(b"\xef\xbb\xbfa\nb", 2), (b"a\x0cb\x85c\n", 1), (b"a\nb\n", 2), (b" a \r\nb\r\n", 2)],
)
def test_only_line_feeds_end_lines(tmp_path: Path, content: bytes, count: int) -> None:
    (tmp_path / "train.a").write_bytes(content.replace(b"\x85", "\x85".encode()))
    assert len(read_lines(tmp_path, "train", "a")) == count


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_blank_content_is_an_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.a").write_bytes(content)
    with pytest.raises(DataError, match="is empty: one line per sample"):
        read_lines(tmp_path, "train", "a")
