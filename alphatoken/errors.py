"""What a user did wrong, and what is wrong with a row of data."""


class UserError(Exception):
    """One clear sentence: what is wrong, where, and what to do. Jobs print it without a traceback."""


class BadRowError(ValueError):
    """A row that cannot be used. It goes to the quarantine table with this reason; the job goes on."""
