"""The errors a user can cause. Each says where, what was given, what is allowed and what is near.

The command line prints their text without a traceback and exits with status 2; anything else that
reaches the user is a defect of the project.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VilmedicError(Exception):
    """Base of every error that a user, rather than the program, has to mend."""


class ConfigError(VilmedicError):
    """A configuration that cannot be run.

    Args:
        problems: one text a problem, each complete in itself; all of them are shown at once.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


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
        given: the name that was not found.
        allowed: the names that exist.

    Returns:
        `" Did you mean 'x'?"`, or an empty string when nothing is close enough.
    """
    names = {name.lower(): name for name in allowed}
    matches = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.6)
    return f" Did you mean '{names[matches[0]]}'?" if matches else ""


LONGEST = 200
"""Letters of a value that a message quotes."""


def visible(text: str) -> str:
    """Text that a message quotes: control characters as escapes, and a long one cut."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} letters)"
    return "".join(one if one.isprintable() else _escape(one) for one in cut)


def escaped(text: str) -> str:
    """Text as a terminal may show it: control characters but for line breaks and tabs escaped."""
    return "".join(one if one.isprintable() or one in "\n\t" else _escape(one) for one in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
