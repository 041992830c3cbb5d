"""Error classes of user mistakes: where, what was given, what is allowed, the nearest match.

The command line prints their text without a traceback and exits with status 2; anything else that
reaches the user is a defect of the project.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

LONGEST_NAME = 200  # letters; comparing two texts of a report's length takes minutes

# All that moves the cursor, turns the direction of the text or cannot be written: control
# characters but for line breaks and tabs, bidirectional marks, and halves of surrogate pairs.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class VilmedicError(Exception):
    """Base of every error that a user, rather than the program, has to fix."""


class ConfigError(VilmedicError):
    """A configuration that cannot be run.

    Args:
        problems: one text a problem, each complete in itself; all of them are shown at once.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ArgumentError(ConfigError):
    """Arguments that a constructor refuses.

    `build` of `vilmedic.config` says in front of each where in the configuration it stands.

    Args:
        problems: what is wrong, by the name of the argument; of one inside an argument the names
            with dots between them, and an empty one for what concerns several.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.arguments = dict(problems)
        super().__init__(f"{name}: {text}" if name else text for name, text in problems.items())


class DataError(VilmedicError):
    """A data file that is missing, malformed or inconsistent; names the file and the line."""


class CheckpointError(VilmedicError):
    """A checkpoint that is missing, unreadable or does not fit the model."""


class Interrupted(BaseException):
    """A run that was asked to stop, by Ctrl-C or by a cluster that takes the machine back.

    Like `KeyboardInterrupt` it may come between any two instructions, so it is no `Exception`:
    whoever handles those of a decoder or of a logger must not take this for one.

    Args:
        message: what was saved and how to continue.
        status: the exit status of the process: 128 and the number of the signal.
    """

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The closing words of a message about an unknown name.

    Args:
        given: the name that was not found; one of more than 200 letters is near to none.
        allowed: the names that exist.

    Returns:
        `" Did you mean 'x'?"`, or an empty string when nothing is close enough.
    """
    if len(given) > LONGEST_NAME:
        return ""
    names = {name.lower(): name for name in allowed if len(name) <= LONGEST_NAME}
    matches = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.6)
    return f" Did you mean '{names[matches[0]]}'?" if matches else ""


def escaped(text: str) -> str:
    """Text from outside as a terminal or a page may show it: `\\x1b` for an escape character."""
    if _HIDDEN.search(text) is None:
        return text
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


LONGEST = 200
"""Letters of a value that a message quotes."""


def visible(text: str) -> str:
    """A value that a message quotes, on one line: escaped, and a long one cut."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} letters)"
    return escaped(cut).replace("\n", "\\n").replace("\t", "\\t")
