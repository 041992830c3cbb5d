"""What can go wrong with a download, each in its own kind."""

from __future__ import annotations

from vilmedic.errors import DataError


class WrongPassword(DataError):
    """The server does not accept user and password, or wants them and got none."""


class NoAccess(DataError):
    """The account is right and may not have this data set yet."""


class NotThere(DataError):
    """The server has no such file."""


class NotAFile(DataError):
    """The server sent a web page, such as a login form, in place of a file."""


class WrongContent(DataError):
    """What arrived is not what was published: another size or another sum."""


class NoSpace(DataError):
    """The disk has too little room."""


class Unreachable(DataError):
    """No answer, or only errors of the server, in spite of all retries."""


class Interrupted(DataError):
    """Another transfer failed for good, so this one stopped."""


FATAL = (WrongPassword, NoAccess, NotAFile, NoSpace, Unreachable, Interrupted)
"""Troubles that the next file would have as well."""
