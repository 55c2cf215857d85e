"""The error that a user can mend, and which every command turns into a message and exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the setting, what it is, what it may be, what to do. Exit code 2."""
