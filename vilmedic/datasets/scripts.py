"""Words of text in any script, also of those that put no spaces between words.

Chinese characters, hiragana and the syllables of Thai, Lao, Burmese and Khmer each count as a word,
and so does a run of katakana: without a dictionary there is no better unit, and a whole clause as
one word would be seen once and never again.
"""

from __future__ import annotations

import re

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HIRAGANA = "\u3041-\u309f"
_KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_SYLLABLES = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ecf\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d"  # Burmese
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
)
_VOWELS_AND_TONES = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
    "\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d"
    "\u109a-\u109d\u17b4-\u17d3\u17dd"
)
UNSPACED = f"[{_KATAKANA}]+|[{_HAN}{_HIRAGANA}]|[{_SYLLABLES}][{_VOWELS_AND_TONES}]*"
"""A word of a script without spaces, as a regular expression that Python and Oniguruma read."""
_WORD = re.compile(rf"{UNSPACED}|[^\W{_KATAKANA}{_HAN}{_HIRAGANA}{_SYLLABLES}]+")


def words(text: str) -> list[str]:
    """The words of a text, without what lies between them."""
    return _WORD.findall(text)
