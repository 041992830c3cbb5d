from __future__ import annotations

from typing import Any

import pytest

from vilmedic.config.marks import Mark, Tree
from vilmedic.config.overrides import apply_overrides, parse_override
from vilmedic.errors import ConfigError


def layer(*words: str, lower: dict[str, Any] | None = None) -> tuple[Tree, Tree, list[str]]:
    below = Tree(lower or {}, {})
    made, problems = apply_overrides([parse_override(word) for word in words], below)
    return made, below, problems


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=1", {"a": 1}),
        ("a.b=5e-5", {"a": {"b": 5e-5}}),
        ("a=", {"a": None}),
        ("a=b=c", {"a": "b=c"}),
        ("a=[x, 1]", {"a": ["x", 1]}),
        ("a.b={c: 1}", {"a": {"b": {"c": 1}}}),
        ("a='00123'", {"a": "00123"}),
        ("a=run #3", {"a": "run #3"}),
    ],
)
def test_a_word_sets_a_value(word: str, expected: dict[str, Any]) -> None:
    assert layer(word)[0].data == expected


@pytest.mark.parametrize(
    ("word", "raw"),
    [("a=1e3", "1e3"), ("a=true", "true"), ("a=[b]", "[b]"), ("a='1'", None), ("a=", None)],
)
def test_what_was_typed_is_kept(word: str, raw: str | None) -> None:
    mark = layer(word)[0].marks[("a",)]
    assert mark.raw == raw
    assert mark.origin == "command line"


def test_text_that_is_no_yaml_is_kept_as_text_with_a_note() -> None:
    made, _, _ = layer("a=@best")
    assert made.data == {"a": "@best"}
    assert "not valid YAML" in made.marks[("a",)].note


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("foo", "'foo' (command line): has no '='"),
        ("~a=1", "takes no value"),
        ("=1", "is not a key"),
        ("a..b=1", "is not a key"),
        ("+a=1", "is not a key"),
        ("includes=[x.yml]", "is only allowed in a file"),
    ],
)
def test_other_words_are_refused(word: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(word)
    assert expected in str(caught.value)


def test_words_count_in_their_order() -> None:
    made, below, problems = layer("a.b=1", "~a", "a.c=2", lower={"a": {"x": 1}})
    assert made.data == {"a": {"c": 2}}
    assert below.data == {}
    assert not problems


def test_a_word_goes_over_an_earlier_one() -> None:
    assert layer("a={b: 1, c: 2}", "a.b=3", "a.d=4")[0].data == {"a": {"b": 3, "c": 2, "d": 4}}
    assert layer("a.b=1", "a=2")[0].data == {"a": 2}
    assert layer("a=2", "a.b=1")[0].data == {"a": {"b": 1}}


def test_removing_what_is_not_there_names_the_nearest() -> None:
    below = Tree({"trainor": {"lr_decay": "X"}}, {("trainor", "lr_decay"): Mark("c.yml:1")})
    _, problems = apply_overrides([parse_override("~trainor.lr_deca")], below)
    assert problems == [
        "~trainor.lr_deca (command line): there is no such key to remove. "
        "Did you mean 'trainor.lr_decay'?"
    ]


def test_one_entry_of_a_list_can_be_set() -> None:
    lower = {"a": [{"b": 1, "c": 2}, "x"]}
    made, below, problems = layer("a.0.b=5", "a.1=y", lower=lower)
    assert made.data == {"a": [{"b": 5, "c": 2}, "y"]}
    assert below.data == {"a": [{"b": 1, "c": 2}, "x"]}
    assert not problems


def test_an_index_beyond_the_list_is_reported() -> None:
    _, _, problems = layer("a.2=5", lower={"a": [1, 2]})
    assert problems == ["a.2 (command line): '2' is no index of the list 'a'. Allowed: 0 to 1."]


@pytest.mark.parametrize(
    "text", ["#x", "# a report", "- No effusion.", "&x", "--- x", "!x", "run #3", "a: b", "[a] b"]
)
def test_text_keys_take_the_text_whatever_it_is_to_yaml(text: str) -> None:
    made, _, _ = layer(f"a={text}")
    assert text in (made.data["a"], made.marks[("a",)].raw)


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL"])
def test_null_is_spelt_as_in_yaml(text: str) -> None:
    assert layer(f"a={text}")[0].data == {"a": None}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.b=1", "a={c: 2}"], {"c": 2}),
        (["a={c: 2}", "a.b=1"], {"c": 2, "b": 1}),
        (["a=null", "a.b=1"], {"b": 1}),
        (["a.b=1", "a={}"], {}),
    ],
)
def test_a_later_section_given_whole_replaces_the_words_before_it(
    words: list[str], expected: dict[str, Any]
) -> None:
    made, _, _ = layer(*words)
    assert made.data == {"a": expected}
    assert made.marks[("a",)].whole
