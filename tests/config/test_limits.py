"""Configurations that would take hours or all memory are refused early."""

from __future__ import annotations

import pytest

from tests.config.conftest import Project
from vilmedic.config.layers import MOST_FILES, MOST_TOGETHER
from vilmedic.config.tree import MOST_PROBLEMS
from vilmedic.config.yaml_source import DEEPEST, MOST_BYTES, MOST_NODES, read_yaml
from vilmedic.errors import ConfigError


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, lambda line: f"x.yml:{line}")
    return str(caught.value)


def nested(levels: int) -> str:
    return "a: 1 #" + "-" * 80 + "\nb: " + "[" * levels + "]" * levels


def test_depth() -> None:
    data, _ = read_yaml(nested(DEEPEST - 1), str)
    for _ in range(DEEPEST - 2):
        (data["b"],) = data["b"]
    assert data["b"] == []
    assert complaint(nested(DEEPEST)) == f"x.yml:2: the file nests deeper than {DEEPEST} levels."
    assert "nests deeper" in complaint("[" * 400_000)
    assert "nests deeper" in complaint("{a: " * 100_000)
    assert "nests deeper" in complaint("- " * 100_000 + "x")


def test_number_of_keys() -> None:
    half = MOST_NODES // 2
    assert len(read_yaml("\n".join(f"{n}:" for n in range(half - 1)), str)[0]) == half - 1
    text = "\n".join(f"{n}:" for n in range(half + 1))
    assert complaint(text).endswith(
        "the file holds more than 100,000 keys and values, references "
        "counted as what they stand for."
    )


def test_yaml_aliases_count_as_their_content() -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert "more than 100,000" in complaint("\n".join(["a0: &a0 [x, x]", *levels]))
    merged = [f"b{n}: &b{n} {{<<: *b{n - 1}, c{n}: *b{n - 1}}}" for n in range(1, 30)]
    assert "more than 100,000" in complaint("\n".join(["b0: &b0 {x: 1}", *merged]))
    deep = [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, DEEPEST + 2)]
    assert "nests deeper" in complaint("\n".join(["a0: &a0 [x]", *deep]))


def test_size_of_a_file(project: Project) -> None:
    text = (project.root / "base.yml").read_text()
    project.write("full.yml", text + "#" * (MOST_BYTES - len(text)))
    project.load(path="full.yml")
    project.write("larger.yml", text + "#" * (MOST_BYTES - len(text) + 1))
    assert project.problem(path="larger.yml") == (
        "larger.yml: the file is larger than 1,000,000 bytes, more than any configuration."
    )


def test_exponentially_growing_includes(project: Project) -> None:
    for number in range(40):
        project.write(f"d{number}.yml", f"includes: [d{number + 1}.yml, d{number + 1}.yml]\n")
    project.write("d40.yml", "x: 1\n")
    assert f"more than {MOST_FILES} files are included" in project.problem(path="d0.yml")


def test_total_size_of_included_files(project: Project) -> None:
    keys = "\n".join(f"k{number}:" for number in range(MOST_TOGETHER))
    project.write("large.yml", f"includes: [base.yml]\n{keys}\n")
    assert "the files hold more than 20,000 values" in project.problem(path="large.yml")


def test_exponentially_growing_interpolations(project: Project) -> None:
    text = [f"x{n}: '${{x{n + 1}}}${{x{n + 1}}}'" for n in range(20)]
    project.write("text.yml", "\n".join([*text, "x20: ab"]))
    assert "stands for more than 3,000 values" in project.problem(path="text.yml")
    chain = [f"x{n}: '${{x{n + 1}}}'" for n in range(60)]
    project.write("chain.yml", "\n".join([*chain, "x60: ab"]))
    assert "refers to others too many times over" in project.problem(path="chain.yml")
    maps = [f"x{n}: {{a: '${{x{n + 1}}}', b: '${{.a}}'}}" for n in range(20)]
    project.write("maps.yml", "\n".join([*maps, "x20: ab"]))
    assert "stands for more than 3,000 values" in project.problem(path="maps.yml")


@pytest.mark.parametrize("text", ["${" * 300, "${a}" * 400, "${name} " * 21])
def test_length_of_interpolation_texts(project: Project, text: str) -> None:
    assert "allowed: 1,000 letters with 20 references" in project.problem(f"ckpt={text}")


def test_nested_interpolations(project: Project) -> None:
    project.write("one.yml", "includes: [base.yml]\nckpt: '${${name}.root}'\nname: dataset\n")
    assert project.load(path="one.yml").ckpt == "data"
    words = "\n".join(f"x{n}: '${{a.${{b}}}}'" for n in range(9))
    project.write("nested.yml", words)
    assert "too many values refer to others" in project.problem(path="nested.yml")


def test_the_number_of_reported_problems_is_limited(project: Project) -> None:
    project.write("many.yml", "\n".join(f"key{number}:" for number in range(30_000)))
    problems = project.problems(path="many.yml")
    assert f"there are more problems than these {MOST_PROBLEMS}." in problems
    assert len(problems) < MOST_PROBLEMS + 10
    names = ",".join(f"no{number}" for number in range(200))
    assert (
        f"given 200; allowed: at most {MOST_PROBLEMS}" in project.problems(f"plugins=[{names}]")[0]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b\0", r"x.yml:1: not valid YAML: the character '\x00' in it."),
        ("a: 1\nb: \x1b[31m", r"x.yml:2: not valid YAML: the character '\x1b' in it."),
        ("a: \ud800", r"x.yml:1: not valid YAML: the character '\ud800' in it."),
        ('a: "\\0"', r"x.yml:1: the text holds the character '\x00', which is not allowed."),
        ('"\\e": 1', r"x.yml:1: the text holds the character '\x1b', which is not allowed."),
        ("a: " + "9" * 5000, "x.yml:1: '" + "9" * 200 + "... (5000 letters)' is not of type int."),
    ],
)
def test_invalid_characters_and_huge_numbers(text: str, expected: str) -> None:
    assert complaint(text) == expected


def test_limits_of_command_line_overrides(project: Project) -> None:
    project.write("with.yml", "includes: [base.yml]\nensemblor: {splits: [validate, test]}\n")
    for index in ("²", "٣", "9" * 5000):
        problem = project.problem(f"ensemblor.splits.{index}=x", path="with.yml")
        assert "is no index of the list 'ensemblor.splits'. Allowed: 0 to 1." in problem
    assert "the character '\\x00'" in project.problem("name=a\0b")
    assert "the character '\\udcff'" in project.problem("name=\udcff")
    assert "more than 64 nested keys" in project.problem(".".join("a" * 65) + "=1")


def test_invalid_file_names(project: Project) -> None:
    assert project.problem(path="a\0b.yml") == "no file can have the name 'a\\x00b.yml'."
    assert "there is no file" in project.problem(path="/dev/zero")
    assert "there is no file" in project.problem(path="x" * 5000)
