from __future__ import annotations

import logging

from hypothesis import given
from hypothesis import strategies as st

from vilmedic.errors import escaped, nearest
from vilmedic.log import _Line


def test_control_characters_are_escaped() -> None:
    assert escaped("\x1b[31mred\r\x07") == "\\x1b[31mred\\r\\x07"
    assert escaped("a\u202eb\ud800") == "a\\u202eb\\ud800"
    text = "neumotórax\tizquierdo\n胸水\u3000正常 می\u200cشود"
    assert escaped(text) == text


@given(st.text(st.characters()))
def test_escaped_text_is_printable(text: str) -> None:
    shown = escaped(text)
    shown.encode()
    assert not [c for c in shown if c < " " and c not in "\n\t"]
    assert escaped(shown) == shown


def test_log_lines_have_no_terminal_escapes() -> None:
    record = logging.LogRecord("vilmedic", logging.INFO, "", 1, "label %s", ("A\x1b[2J",), None)
    assert _Line("%(message)s").format(record) == "label A\\x1b[2J"


def test_very_long_names_are_no_suggestions() -> None:
    assert nearest("Edemma", ["Edema", "x" * 10**6]) == " Did you mean 'Edema'?"
    assert nearest("x" * 10**6, ["x" * 10**6]) == ""
