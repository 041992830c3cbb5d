"""Detection of the character set of text whose encoding is missing or wrong.

Valid UTF-8 is UTF-8: text in another character set is almost never valid UTF-8 by accident. All
other text is decoded with each common character set, and scored by how plausible the result is: by
the measures of charset-normalizer (chaos and coherence) and by typical errors of a wrong character
set, such as a Greek letter in the middle of a Latin word. If a few letters leave it open, the text
is marked as doubtful.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from charset_normalizer import from_bytes

from vilmedic.errors import DataError, nearest

# In order of preference for ambiguous text.
CANDIDATES = (
    *("gb18030", "cp1252", "cp1251", "cp1250", "shift_jis", "euc_kr", "big5", "euc_jp"),
    *("koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "cp874", "cp1257", "cp1258"),
)
POOL = 2**15  # bytes used to find a character set
SAMPLES = 100  # longest texts of a source that are used to find its character sets
MOST_ODD = 0.2  # largest share of odd characters in accepted text
MARGIN = 0.03  # margin of the best character set over the next
_COHERENCE = 0.25  # weight of the coherence with a language beside odd characters
# First bytes of the characters that are in everyday use.
_EVERYDAY = {
    "gb18030": (0xB0, 0xD7),
    "euc_kr": (0xB0, 0xC8),
    "big5": (0xA4, 0xC6),
    "euc_jp": (0xB0, 0xCF),
    "shift_jis": (0x88, 0x97),
}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Letters outside ASCII that languages of Latin script write, by the character set of their texts.
_ALPHABETS: dict[str, tuple[str, ...]] = {
    "cp1252": (
        "àâçéèêëîïôœùûüÿ",  # French
        "áéíñóúü",  # Spanish
        "áâãàçéêíóôõú",  # Portuguese
        "àçéèíïñóòúü",  # Catalan
        "àèéìíîòóùú",  # Italian
        "äöüßéàè",  # German
        "àáèéêëïíöóüúç",  # Dutch
        "åäöéüà",  # Swedish and Finnish
        "æøåéêòôüäö",  # Danish and Norwegian
    ),
    "cp1250": (
        "áčďéěíňóřšťúůýžäľĺôŕ",  # Czech and Slovak
        "ąćęłńóśźż",  # Polish
        "áéíóöőúüű",  # Hungarian
        "čćđšž",  # Croatian, Slovenian and others
        "ăâîşţ",  # Romanian
    ),
    "cp1254": ("çğıİöşüâîû",),  # Turkish
    "cp1257": ("ąčęėįšųūž", "āčēģīķļņšūž", "äöõüšž"),  # Lithuanian, Latvian, Estonian
}
_ICELANDIC = "áðéíóúýþæö"  # some of these bytes are Turkish letters in cp1254
_FITTING = 0.95  # share of the letters that must be in the alphabet of a language
_BETTER = 0.05  # margin of another character set over Western European
_WITHIN = re.compile(r"(?<=[^\W\d_])[^\x00-\x7f](?=[^\W\d_])")
_AFTER_SMALL = re.compile(r"(?<=[a-z])[^\x00-\x7f]")
_JOINING = "\u2019\xb4\u2013\u2014\xb7\xad"  # apostrophes, dashes, a middle dot, a soft hyphen
_SIGNS = "\xaa\xba\xb5"  # letters that are signs: ª, º, µ
_SPACES = frozenset("\t\n\r\f\v")
_LATIN = ("LATIN", "FEMININE", "MASCULINE", "MICRO")  # and the letters that are signs: ª, º, µ


@dataclass(frozen=True)
class Decoded:
    """A text and how it was read.

    Attributes:
        text: without replacement characters.
        encoding: the name that Python has for its character set.
        doubtful: another character set gives as likely a text.
    """

    text: str
    encoding: str
    doubtful: bool = False


def known_encoding(name: str) -> str:
    """Return Python's name of a character set given on the command line.

    Raises:
        DataError: there is none of that name.
    """
    try:
        found = codecs.lookup(name).name
        b"text".decode(found, "replace")  # refuses codecs that are no text encodings, such as hex
    except LookupError:
        allowed = ["utf-8", "utf-16", *CANDIDATES]
        raise DataError(
            f"There is no character set '{name}' (given with --encoding). Among others there are "
            f"{', '.join(allowed)}.{nearest(name, allowed)}"
        ) from None
    return found


def decode_text(content: bytes) -> Decoded:
    """Decode the text of a file.

    Args:
        content: all of it, with or without a byte order mark.
    """
    return decode_unicode(content) or decode_all([content])[0]


def decode_unicode(content: bytes) -> Decoded | None:
    """Decode text with a byte order mark, or UTF-8 without; None for anything else."""
    for mark, encoding in _MARKS:
        if content.startswith(mark) and (text := _strictly(content, encoding)) is not None:
            return Decoded(text, encoding)
    text = as_utf8(content)
    return None if text is None else Decoded(text, "utf-8")


def as_utf8(content: bytes) -> str | None:
    """The text of valid UTF-8, None for anything else."""
    return _strictly(content, "utf-8")


def decode_all(contents: Sequence[bytes]) -> list[Decoded]:
    """Decode non-UTF-8 texts of one source, such as the headers of a folder.

    The character sets are found from the unambiguous texts, or from all texts together if each one
    is too short: a name of two characters alone is not enough.

    Args:
        contents: the texts.
    """
    distinct = sorted(dict.fromkeys(contents), key=len, reverse=True)
    votes = Counter(name for name, sure in map(detect, distinct[:SAMPLES]) if sure)
    if not votes:
        together = b"\n".join(distinct)
        name, sure = detect(together if len(together) <= POOL else b"\n".join(distinct[:SAMPLES]))
        votes = Counter([name] if sure else [])
    found = {
        content: _decoded(content, [name for name, _ in votes.most_common()])
        for content in distinct
    }
    return [found[content] for content in contents]


def detect(content: bytes) -> tuple[str, bool]:
    """Return the most likely character set of non-UTF-8 bytes.

    Returns:
        Its name, and whether no other one gives a different, about equally likely text.
    """
    matches = from_bytes(
        content[:POOL],
        cp_isolation=list(CANDIDATES),
        preemptive_behaviour=False,
        enable_fallback=False,
        threshold=0.35,
    )
    ranked = sorted(
        (
            match.chaos + oddness(str(match), name) - _COHERENCE * match.coherence,
            CANDIDATES.index(name),
            str(match),
        )
        for match in matches
        for name in {match.encoding, *match.could_be_from_charset} & set(CANDIDATES)
    )
    if not ranked:
        return "latin-1", False  # it decodes any bytes without loss
    least, _, text = ranked[0]
    rivals = [score for score, _, other in ranked if other != text]
    tied = [number for score, number, _ in ranked if score <= least + MARGIN]
    return CANDIDATES[min(tied)], not rivals or rivals[0] > least + MARGIN


def latin_encoding(content: bytes) -> str | None:
    """Return the character set of Latin-script text, by the letters of languages.

    Its bytes are letters in all of these character sets, but only in the right one are they letters
    of a single language.

    Args:
        content: not UTF-8.

    Returns:
        Its name; empty if several fit, and None if the letters fit no single language.
    """
    texts = {name: content.decode(name, errors="replace") for name in _ALPHABETS}
    fits = {name: _fit(texts[name], alphabets) for name, alphabets in _ALPHABETS.items()}
    western = fits.pop("cp1252")
    best = max(fits, key=lambda name: fits[name])
    if western >= _FITTING and western >= fits[best] - _BETTER:
        return "cp1252"
    if fits[best] < _FITTING or fits[best] <= western + _BETTER:
        return None
    if texts[best] == texts["cp1252"]:
        return "cp1252"
    near = [name for name in fits if fits[name] > fits[best] - _BETTER]
    return best if all(texts[name] == texts[best] for name in near) else ""


def is_western(content: bytes) -> bool:
    """Return whether a text is in one or several Western European languages, by its letters."""
    text = content.decode("cp1252", errors="replace")
    return _fit(text, ["".join([*_ALPHABETS["cp1252"], _ICELANDIC])]) >= _FITTING


def _fit(text: str, alphabets: Sequence[str]) -> float:
    """Return the largest share of non-ASCII letters and signs in words that fit a language."""
    letters = Counter(c for c in text if not c.isascii() and c.isalpha() and c not in _SIGNS)
    letters.update(c for c in _WITHIN.findall(text) if not c.isalpha() and c not in _JOINING)
    total = letters.total()
    if not total:  # only quotation marks and signs
        return 1.0
    letters.subtract(c for c in _AFTER_SMALL.findall(text) if c.isupper())  # in no language
    return max(
        sum(count for c, count in letters.items() if c in known or c.lower() in known) / total
        for known in alphabets
    )


def oddness(text: str, encoding: str) -> float:
    """Return the share of non-ASCII characters that correctly decoded text rarely has.

    These are control characters, capitals after small letters, signs next to letters, letters of
    another script than their neighbours, and rare signs.

    Args:
        text: the decoded text.
        encoding: the character set that it was decoded with, one of `CANDIDATES`.
    """
    total = odd = 0
    padded = f" {text} "
    for place, character in enumerate(text, start=1):
        if character.isascii() and (character.isprintable() or character in _SPACES):
            continue
        total += 1
        odd += _is_odd(padded[place - 1], character, padded[place + 1], encoding)
    return odd / total if total else 0.0


def is_credible(text: str, encoding: str) -> bool:
    """Return whether a text can be in the character set that a file declares."""
    if any(unicodedata.category(c) == "Cc" and c not in _SPACES and c != "\x1b" for c in text):
        return False
    if oddness(text, encoding) > MOST_ODD:
        return False
    # Words of Latin script have few non-ASCII letters, unlike those of any other script.
    beyond = [c for c in text if not c.isascii()]
    if any(c.isalpha() and _script(c) not in _LATIN for c in beyond):
        return True
    return len(beyond) <= 0.4 * (len(beyond) + sum(c.isalpha() and c.isascii() for c in text))


def _decoded(content: bytes, common: Sequence[str]) -> Decoded:
    """Decode a text with one of the character sets of its source, or with the likeliest one."""
    ranked = sorted(
        (oddness(text, name), place, text, name)
        for place, name in enumerate(common)
        if (text := _strictly(content, name)) is not None
    )
    if ranked and ranked[0][0] <= MOST_ODD:
        least, _, text, name = ranked[0]
        if all(odd > least + MARGIN for odd, _, other, _ in ranked if other != text):
            return Decoded(text, name)
    name, sure = detect(content)
    text = _strictly(content, name)
    if text is None:
        return Decoded(content.decode("latin-1"), "latin-1", True)
    return Decoded(text, name, not sure)


def _strictly(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return None


@lru_cache(maxsize=2**16)
def _is_odd(before: str, character: str, after: str, encoding: str) -> bool:
    category = unicodedata.category(character)
    if category in ("Cc", "Cn", "Co"):
        return True
    if category[0] not in "LM":
        beside = any(near.isalpha() and not near.isascii() for near in (before, after))
        return beside and character < "\u0100" and category[0] != "P"
    if category == "Lu" and before.islower():
        return True
    script = _script(character)
    if any(near.isalpha() and _script(near) != script for near in (before, after)):
        # Chinese and Japanese mix scripts, also with Latin abbreviations and units.
        eastern = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL")
        small = before.isalpha() and before.isascii() and after.isalpha() and after.isascii()
        if script not in eastern or small:
            return True
    if encoding in _EVERYDAY and script in ("CJK", "HANGUL"):
        low, high = _EVERYDAY[encoding]
        return not low <= character.encode(encoding)[0] <= high
    return False


@lru_cache(maxsize=2**16)
def _script(character: str) -> str:
    """Return the first word of a character's Unicode name, which is its script."""
    name = unicodedata.name(character, "")
    return name.removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ").split(" ")[0]
