"""The configuration reference, from the commands' own pydantic classes: see generated.py."""

import importlib
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin
from unittest import mock

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from alphatoken.errors import option_name
from jobs import cli, config_file
from jobs.main import COMMANDS

KINDS = {str: "text", int: "whole number", float: "number", bool: "yes or no", Any: "any"}
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least"}


def reference() -> str:
    """All commands, as Markdown."""
    return "\n".join(line for name, (_, says) in COMMANDS.items() for line in _command(name, says))


def config_class(command: str) -> type[BaseModel]:
    """What a command's arguments are parsed into. The command is called, with a stand-in for what would parse."""
    module, _ = COMMANDS[command]
    found: list[type[BaseModel]] = []

    def record(config_class: type[BaseModel], *_: Any, **__: Any) -> int:
        found.append(config_class)
        return cli.OK

    with mock.patch.object(cli, "run", record):
        importlib.import_module(module).main([])
    return found[0]


def _command(name: str, says: str) -> Iterator[str]:
    kind = config_class(name)
    yield f"## alphatoken {name}\n"
    yield f"{says[:1].upper()}{says[1:]}."
    yield f"In Python: `{kind.__module__}.{kind.__name__}`.\n"
    yield "| option | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    own = kind.__annotations__  # in the order of --help
    fields = kind.model_fields.items()
    for field_name, field in sorted(fields, key=lambda item: (not item[1].is_required(), item[0] not in own)):
        meaning = _options_as_code(field.description or "")
        cells = (f"`{option_name(field_name)}`", _type(field), _default(field), meaning)
        yield "| " + " | ".join(_cell(text) for text in cells) + " |"
    yield ""


def _type(field: FieldInfo) -> str:
    text = _kind(field.annotation)
    limits = [
        f"{sign} {getattr(found, name)}"
        for found in field.metadata
        for name, sign in LIMITS.items()
        if getattr(found, name, None) is not None
    ]
    return f"{text}, {', '.join(limits)}" if limits else text


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"`name={_kind(arguments[1]).replace(' ', '-')}`, several"
    members = config_file.members(annotation)
    if len(members) > 1:
        return " or ".join(_kind(member) for member in members)
    if members and members[0] is not annotation:
        return _kind(members[0])
    if hasattr(annotation, "__metadata__"):  # Annotated, inside a union
        return _kind(arguments[0])
    return KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if text := cli.dependent_default(field):
        return text
    value = field.get_default(call_default_factory=True)
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"`{value}`"


def _options_as_code(text: str) -> str:
    """Two hyphens would become a dash. Every second part is code already."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"--[a-z][a-z-]*", r"`\g<0>`", part) for part in parts[::2]]
    return "`".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
