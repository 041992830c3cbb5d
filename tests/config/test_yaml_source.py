from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.full_disk import odd_file
from vilmedic.config.yaml_source import PlainDumper, read_file, read_yaml, to_yaml
from vilmedic.errors import ConfigError


def value(text: str) -> Any:
    return read_yaml(text, lambda line: f"x.yml:{line}")[0]


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        value(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5e-5", 5e-5),
        ("1e-8", 1e-8),
        ("1E5", 1e5),
        ("-.5", -0.5),
        (".inf", math.inf),
        ("12", 12),
        ("-1_000", -1000),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("00123", "00123"),
        ("'00123'", "00123"),
        ("no", "no"),
        ("on", "on"),
        ("0x10", "0x10"),
        ("2020-01-01", "2020-01-01"),
        ("12:30", "12:30"),
        ("1e", "1e"),
        ("!!str 12", "12"),
        ("[a, 1, {b: 2.5}]", ["a", 1, {"b": 2.5}]),
    ],
)
def test_scalars_follow_the_documented_rules(text: str, expected: object) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_every_value_has_its_line_and_raw_text() -> None:
    data, marks = read_yaml("a: 1e3\nb:\n  c: [x,\n    007, 08.50]\n", lambda line: f"f:{line}")
    assert data == {"a": 1000.0, "b": {"c": ["x", "007", 8.5]}}
    assert marks[("a",)].origin == "f:1"
    assert marks[("a",)].raw == "1e3"
    assert marks[("b", "c")].origin == "f:3"
    assert marks[("b", "c", 1)].origin == "f:4"
    assert marks[("b", "c", 1)].raw is None
    assert marks[("b", "c", 2)].raw == "08.50"


def test_anchors_and_merged_mappings() -> None:
    text = "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {<<: [{b: 9}, *x]}\n"
    data, marks = read_yaml(text, lambda line: str(line))
    assert data["y"] == {"a": 1, "b": 3}
    assert data["z"] == {"a": 1, "b": 9}
    assert marks[("y", "a")].origin == "1"
    assert marks[("y", "b")].origin == "2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", "x.yml:2:2: not valid YAML"),
        ("a:\n\tb: 1\n", "Indent with spaces, not with tabs"),
        ("a: 1\nb:\n  c: 2\n  c: 3\n", "x.yml:4: the key 'b.c' is given twice, first at x.yml:3."),
        ("a: !!python/object/apply:os.getcwd []", "python/object/apply:os.getcwd' is not allowed"),
        ("a: !!int x", "x.yml:1: 'x' is not of type int"),
        ("&a [*a]", "x.yml:1: the anchor contains itself"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("? [a]\n: 1", "a key has to be plain text"),
        ("a: @b", "x.yml:1:4: not valid YAML"),
    ],
)
def test_invalid_yaml_is_reported_with_file_and_line(text: str, expected: str) -> None:
    assert expected in complaint(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "is empty"), ("# nothing\n", "is empty"), ("- a\n", "holds a list"), ("a", "holds 'a'")],
)
def test_a_file_must_hold_a_mapping(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "c.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        read_file(str(path))


def test_a_file_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_file(str(path))


def test_a_byte_order_mark_is_not_part_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_file(str(path)).data == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        {"a": "5e-5", "b": 5e-5, "c": "no", "d": "null", "e": None, "f": True, "g": "true"},
        {"a": "00123", "b": "", "c": "x: y", "d": "two\nlines", "e": " edge ", "f": "#x"},
        {"a": [1, [2.5, "3"]], "b": {"c": {}, "d": [], "e": [{"f": 1}]}, "g": math.inf},
    ],
)
def test_written_yaml_is_read_back(data: dict[str, Any]) -> None:
    assert value(to_yaml(data)) == data


def test_interpolation_like_text_is_escaped() -> None:
    assert yaml.dump({"a": "${b}"}, Dumper=PlainDumper) == "a: \\${b}\n"


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_special_files_are_not_opened(tmp_path: Path, kind: str) -> None:
    path = odd_file(tmp_path / "a.yml", kind)
    with pytest.raises(ConfigError, match=f"cannot be read .it is {kind}, not a file"):
        read_file(str(path))
