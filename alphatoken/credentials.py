"""Settings go into manifests, data cards and logs, so an address that holds a password is refused.

Credentials come from the environment (AWS_ACCESS_KEY_ID, HF_TOKEN ...) or from the machine's own identity.
"""

import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from alphatoken.errors import UserError, option_name

# user:password@; without a password it may be the name of a container. A port is followed by a slash or the end.
PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/:@\s]*:(?![0-9]+(?:/|$))[^@\s]+@", re.IGNORECASE)
SECRET_PARAMETERS = re.compile(
    r"(sig|signature|token|key|secret|password|credential|access_?key(_?id)?)", re.IGNORECASE
)


def holds_secret(address: str) -> bool:
    """Whether `address` is a URI with a password or a signature in it."""
    if "://" not in address or any(character.isspace() for character in address):
        return False
    if PASSWORD.search(address):
        return True
    try:
        query = urlsplit(address).query
    except ValueError:
        return False
    names = [name.rpartition("-")[2] for name, _ in parse_qsl(query)]  # X-Amz-Signature
    return any(SECRET_PARAMETERS.fullmatch(name) for name in names)


def refuse_secrets(values: Any, name: str = "") -> None:
    """UserError, without the secret, where a string anywhere in `values` (nested dicts and lists) holds one."""
    if isinstance(values, dict):
        for key, value in values.items():
            refuse_secrets(value, name or str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            refuse_secrets(value, name)
    elif isinstance(values, str) and holds_secret(values):
        scheme = values.partition("://")[0]
        raise UserError(
            f"{option_name(name)}: the {scheme}:// address holds a password or a signature, which would "
            "stand in manifests and logs; give credentials through environment variables"
        )
