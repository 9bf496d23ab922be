"""Trying again where storage fails now and then: networks, busy object stores, network file systems.

Only for operations that may be repeated. What another attempt cannot change (a missing file, no permission, a full
disk) is raised at once.
"""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from alphatoken.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 4
FIRST_WAIT = 0.5  # seconds; doubled after every attempt, and up to half as much again, so that workers spread out

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
TRANSIENT = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN,
        errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNABORTED, errno.ECONNRESET,
        errno.ECONNREFUSED, errno.EPIPE, errno.EREMOTEIO,
    }
)  # fmt: skip
# Errors of fsspec's drivers that are no OSErrors; by name, because a driver need not be installed.
TRANSIENT_NAMES = frozenset(
    {
        "ServerDisconnectedError", "ClientPayloadError", "EndpointConnectionError", "ConnectionClosedError",
        "ConnectTimeoutError", "ReadTimeoutError", "IncompleteRead", "ServiceRequestError", "ServiceResponseError",
    }
)  # fmt: skip
TOO_BUSY = (408, 429)  # HTTP; and everything from 500


def is_transient(error: BaseException) -> bool:
    """Whether the same operation may succeed a moment later."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT
    status = getattr(error, "status", None) or getattr(error, "code", None)
    busy = isinstance(status, int) and (status >= 500 or status in TOO_BUSY)
    return busy or any(kind.__name__ in TRANSIENT_NAMES for kind in type(error).__mro__)


def is_refused(error: BaseException) -> bool:
    """Whether the storage, not what is stored, is the reason: no permission any more, gone, another error number.

    Damaged files have none: gzip and Arrow raise an OSError without a number.
    """
    return isinstance(error, OSError) and (
        error.errno is not None or isinstance(error, PermissionError | FileNotFoundError)
    )


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_FULL


def wait(attempt: int) -> None:
    """Before the attempt after number `attempt` (from 1)."""
    time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(1, 1.5))


def retried(operation: Callable[[], Result], uri: str) -> Result:
    """The result of an operation that may be repeated, on the file or folder `uri`.

    Raises:
        UserError: the disk is full, or every attempt failed in a way that may pass.
        Exception: what the operation raises otherwise, at once.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except Exception as error:  # is_transient knows errors of drivers that are not installed here
            if is_disk_full(error):
                full = getattr(error, "strerror", error)
                raise UserError(
                    f"{uri}: no space is left there ({full}); free some and run the same command again: it "
                    "resumes"
                ) from error
            if not is_transient(error):
                raise
            said = str(error) or type(error).__name__
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{uri}: the storage failed {ATTEMPTS} times ({said}); once it answers, run the same command "
                    "again: it resumes"
                ) from error
        logger.warning("%s: %s; trying again (%d of %d)", uri, said, attempt + 1, ATTEMPTS)
        wait(attempt)
    raise AssertionError("the last attempt returns or raises")
