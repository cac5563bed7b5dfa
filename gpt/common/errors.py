"""Errors that a user can fix: each is one line, and each kind has its exit code (sysexits)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """One line: what, where, got, expected, nearest match, next action."""

    exit_code = 64


class Diverged(UserError):
    """A loss or gradient became NaN or infinite."""

    exit_code = 17


class DataError(UserError):
    """A file exists, but its content is wrong."""

    exit_code = 65


class MissingInput(UserError):
    """A requested file, data set or device is missing."""

    exit_code = 66


class Locked(UserError):
    """Another process is writing to the same directory."""

    exit_code = 75


class ProcessLost(UserError):
    """Another process of the same run has ended."""

    exit_code = 74


class ConfigError(UserError):
    """A name, type or value in the configuration is wrong."""

    exit_code = 78


NO_MEMORY = 71  # the exit code if memory runs out
IO_ERROR = 74  # the exit code of an OSError that reaches the command line: disk full, no permission


def nearest(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'layer'?`, or an empty string if no option is close."""
    matches = get_close_matches(word, list(options), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
