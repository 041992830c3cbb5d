"""Error classes for user errors: where, what was given, what is allowed, the nearest match.

The command line prints their text without a traceback and exits with status 2; any other error that
reaches the user is a bug.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

INTERRUPTED = 130  # exit status after Ctrl-C, as shells report it
LONGEST_NAME = 200  # characters; comparing two texts of a report's length takes minutes

# Characters that move the cursor, change the text direction or cannot be encoded: control
# characters except line breaks and tabs, bidirectional marks, and lone surrogates.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class VilmedicError(Exception):
    """Base class of errors that the user has to fix."""


class ConfigError(VilmedicError):
    """A configuration that cannot be run.

    Args:
        problems: one complete text per problem; all are shown at once.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ArgumentError(ConfigError):
    """Arguments that a constructor refuses.

    `build` of `vilmedic.config` adds the place in the configuration to each.

    Args:
        problems: problems by the name of the argument; nested names are dotted, and the name is
            empty if several arguments are concerned.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.arguments = dict(problems)
        super().__init__(f"{name}: {text}" if name else text for name, text in problems.items())


class DataError(VilmedicError):
    """A data file that is missing, malformed or inconsistent; names the file and the line."""


class CheckpointError(VilmedicError):
    """A checkpoint that is missing, unreadable or does not fit the model."""


class Interrupted(BaseException):
    """A run was asked to stop, by Ctrl-C or by a cluster that preempts the job.

    Like `KeyboardInterrupt` it may be raised between any two instructions, so it is no `Exception`:
    handlers for errors of a decoder or logger must not catch it.

    Args:
        message: what was saved and how to continue.
        status: the exit status of the process: 128 plus the number of the signal.
    """

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


@contextmanager
def before_training() -> Iterator[None]:
    """Turn Ctrl-C into the message that training has not begun."""
    try:
        yield
    except KeyboardInterrupt:
        message = "before training began; the same command starts it"
        raise Interrupted(message, INTERRUPTED) from None


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return a suggestion for the end of a message about an unknown name.

    Args:
        given: the unknown name; names of more than 200 characters get no suggestion.
        allowed: the existing names.

    Returns:
        `" Did you mean 'x'?"`, or an empty string when nothing is close enough.
    """
    if len(given) > LONGEST_NAME:
        return ""
    names = {name.lower(): name for name in allowed if len(name) <= LONGEST_NAME}
    matches = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.6)
    return f" Did you mean '{names[matches[0]]}'?" if matches else ""


def escaped(text: str) -> str:
    """Escape untrusted text for a terminal or page: `\\x1b` for an escape character."""
    if _HIDDEN.search(text) is None:
        return text
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


LONGEST = 200
"""Most characters of a value that a message quotes."""


def visible(text: str) -> str:
    """Return a value for a message on one line: escaped, and cut if it is long."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} letters)"
    return escaped(cut).replace("\n", "\\n").replace("\t", "\\t")
