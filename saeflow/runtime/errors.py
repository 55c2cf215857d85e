"""The error that a user can fix. Every command turns it into a message and exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can fix. The message names the setting, its value, what it may be and what to do."""


class ToldElsewhere(UserError):
    """Ends one of several processes whose error another one prints."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters; the error's type if it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
