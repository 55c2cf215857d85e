"""The error that a user can fix. Every command shows its message and ends with exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can fix. The message names the setting, its value, the allowed values and what to do."""
