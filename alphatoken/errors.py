"""What a user did wrong, what is wrong with a row of data, and what an exception says."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One clear sentence: what is wrong, where, and what to do. Jobs print it without a traceback."""


class BadRowError(ValueError):
    """A row that cannot be used. It goes to the quarantine table with this reason; the job goes on."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(name, list(choices), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def option_name(field: str) -> str:
    """Of a setting, on the command line."""
    return "--" + field.replace("_", "-")


def option_names(fields: Iterable[str]) -> str:
    """Of several."""
    return ", ".join(map(option_name, fields))


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
