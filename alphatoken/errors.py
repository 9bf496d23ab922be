"""What a user did wrong, what is wrong with a row of data, and what an exception says."""


class UserError(Exception):
    """One clear sentence: what is wrong, where, and what to do. Jobs print it without a traceback."""


class BadRowError(ValueError):
    """A row that cannot be used. It goes to the quarantine table with this reason; the job goes on."""


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
