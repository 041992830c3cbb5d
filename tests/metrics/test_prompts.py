from __future__ import annotations

from pathlib import Path

import pytest

from tests.disk import odd_file
from vilmedic.errors import ConfigError, DataError
from vilmedic.metrics.prompts import load_prompts

LABELS = ("Effusion", "Mass", "No Finding")


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "prompts.yml"
    path.write_text(text)
    return str(path)


def test_reads_classes_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "Mass: {positive: [a, b], negative: [no]}\nEffusion: {positive: [e], negative: [n]}",
    )
    mass, effusion = load_prompts(path, LABELS)
    assert (mass.name, mass.positive, mass.negative) == ("Mass", ("a", "b"), ("no",))
    assert effusion.name == "Effusion"


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no file .*Did you mean '.*prompts.yml'"):
        load_prompts(str(tmp_path / "prompt.yml"), LABELS)
    with pytest.raises(ConfigError, match="no file"):
        load_prompts(str(tmp_path), LABELS)


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_prompts(str(odd_file(tmp_path / "prompts.yml", kind)), LABELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", ":1: not a mapping"),
        ("a: [", "not a readable YAML file"),
        ("\nEfusion: {positive: [a], negative: [b]}", ":2: .*'Efusion'.*Did you mean 'Effusion'"),
        ("Mass: {positive: [a]}", "'Mass' has no negative prompts"),
        ("Mass: {positive: [a], negative: []}", "negative prompts is empty"),
        ("Mass: {positive: a mass, negative: [b]}", "positive of 'Mass' is not a list"),
        ("Mass: {positive: [' '], negative: [b]}", "empty or not a text"),
        ("Mass: {positive: [[a]], negative: [b]}", "empty or not a text"),
        ("Mass: {positive: [a], negativ: [b]}", "'negativ'.*Did you mean 'negative'"),
        ("Mass: [a]", "class 'Mass': not a mapping"),
        ("Mass: {positive: [a], negative: [b]}\nMass: {positive: [a], negative: [b]}", "twice"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, text), LABELS)


def test_says_everything_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "Mas: {positive: [a], negative: [b]}\nEffusion: {positive: [a]}")
    with pytest.raises(DataError) as caught:
        load_prompts(path, LABELS)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: &a [x, x]\n"
        + "\n".join(
            f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]" for n in range(20)
        ),
    ],
)
def test_files_that_multiply_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.yml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"not a readable YAML file: .* (nests deeper|more than)"):
        load_prompts(str(path), ["a"])
