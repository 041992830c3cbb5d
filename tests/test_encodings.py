from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilmedic.encodings import decode_all, decode_text, is_credible, known_encoding
from vilmedic.errors import DataError

MARKED = (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb")
TEXTS = {
    "gb18030": "两肺纹理清晰，心影不大，未见胸腔积液。",
    "cp1251": "Без очаговых и инфильтративных изменений. Сердце не увеличено.",
    "cp1253": "Χωρίς εστιακές αλλοιώσεις των πνευμόνων",
    "shift_jis": "両肺野に異常陰影を認めません。",
    "euc_kr": "양측 폐야에 이상 소견 없음. 심장 크기는 정상이며 흉수는 보이지 않음.",
    "big5": "雙側肺野清晰，心臟大小正常",
    "koi8_r": "Без очаговых изменений в легких, сердце не увеличено",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_character_set_is_found(encoding: str) -> None:
    found = decode_text(TEXTS[encoding].encode(encoding))
    assert (found.text, found.encoding, found.doubtful) == (TEXTS[encoding], encoding, False)


def test_western_text_is_decoded_right_despite_an_ambiguous_encoding() -> None:
    for text in ("Épanchement pleural gauche", "The patient’s heart – normal", "pequeño derrame"):
        assert decode_text(text.encode("cp1252")).text == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_unicode_encodings_are_detected_exactly(encoding: str) -> None:
    found = decode_text("肺 Ödem".encode(encoding))
    assert (found.text, found.doubtful) == ("肺 Ödem", False)


def test_short_texts_are_ambiguous_alone_and_resolved_by_others() -> None:
    assert decode_text("张三".encode("gb18030")).doubtful
    names = [name.encode("gb18030") for name in ("张三", "李四", TEXTS["gb18030"])]
    assert [(one.text, one.doubtful) for one in decode_all(names)] == [
        ("张三", False),
        ("李四", False),
        (TEXTS["gb18030"], False),
    ]


def test_mixed_encodings_are_distinguished() -> None:
    chosen = ["gb18030"] * 3 + ["cp1251"]
    found = decode_all([TEXTS[encoding].encode(encoding) for encoding in chosen])
    assert [one.text for one in found] == [TEXTS[encoding] for encoding in chosen]


def test_declared_encodings_are_validated() -> None:
    assert is_credible("Müller^Jürgen", "latin-1")
    assert is_credible("Épanchement pleural", "latin-1")
    assert not is_credible("The patient’s".encode("cp1252").decode("latin-1"), "latin-1")
    for encoding in ("gb18030", "cp1251", "cp874"):
        text = TEXTS.get(encoding, "ปอดทั้งสองข้างปกติ")
        assert not is_credible(text.encode(encoding).decode("latin-1"), "latin-1")


@given(st.binary(max_size=60))
def test_any_bytes_are_decoded_without_replacement_characters(content: bytes) -> None:
    found = decode_text(content)
    assert found.text.encode(found.encoding) == content or content[:2] in MARKED
    assert "\ufffd" not in found.text or "\ufffd".encode() in content


def test_encoding_names() -> None:
    assert known_encoding("GBK") == "gbk"
    for name in ("gb18031", "hex"):
        with pytest.raises(DataError, match="no character set"):
            known_encoding(name)
