"""Several validation targets in one run: their names, their columns, and their weighted sum.

    --validation math=m1.jsonl math=m2.jsonl code=c.jsonl
    adaptation.math, adaptation.code    a column for each target
    adaptation                          their sum: the value along the sum of their directions

Files without a name are the one target of an ordinary run, whose column is `adaptation` alone. A name is letters,
digits, - and _, so a path with a folder before its `=` is no name; ./ before the path makes it none either.
"""

import re
from collections.abc import Mapping, Sequence

from alphatoken.errors import UserError

ADAPTATION = "adaptation"
UNNAMED = ""
NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)", re.DOTALL)


def files_by_target(validation: Sequence[str]) -> dict[str, list[str]]:
    """Validation files by name of their target; UNNAMED where no file has a name. Empty without files.

    Raises:
        ValueError: some files have a name and others have none.
    """
    found: dict[str, list[str]] = {}
    for item in validation:
        named = NAMED.fullmatch(item)
        name, file = (named[1], named[2]) if named else (UNNAMED, item)
        found.setdefault(name, []).append(file)
    if UNNAMED in found and len(found) > 1:
        raise ValueError(
            f"--validation {found[UNNAMED][0]} has no target's name and other files have one: give every file as "
            "NAME=FILE, or none"
        )
    return found


def validation_files(validation: Sequence[str]) -> list[str]:
    """The files of all targets. Raises as `files_by_target` does."""
    return [file for files in files_by_target(validation).values() for file in files]


def target_names(validation: Sequence[str]) -> list[str]:
    """Names of the targets in the order in which they were given; empty for an ordinary run."""
    return [name for name in files_by_target(validation) if name != UNNAMED]


def one_target(validation: Sequence[str], who: str) -> None:
    """Raises ValueError where targets have names, in a stage (`who`) that knows one target only."""
    if names := target_names(validation):
        raise ValueError(f"{who} one target: give --validation FILES without names, not {', '.join(names)}")


def target_column(target: str) -> str:
    """The column of a target's values."""
    return f"{ADAPTATION}.{target}" if target else ADAPTATION


def target_columns(targets: Sequence[str]) -> list[str]:
    """Columns of named targets."""
    return [target_column(name) for name in targets]


def weights_of(targets: Sequence[str], given: Mapping[str, float], source: str) -> dict[str, float]:
    """The weight of every target of a scored folder: as given, else 1. Empty where nothing was given.

    Raises:
        UserError: a name that is no target of `source`, or no weight but zeros.
    """
    if not given:
        return {}
    if not targets:
        raise UserError(
            f"--target-weights: {source} has one target without a name; score it with --validation NAME=FILE"
        )
    for name in given:
        if name not in targets:
            raise UserError(f"--target-weights {name}: {source} has no such target; it has {', '.join(targets)}")
    weights = {name: given.get(name, 1.0) for name in targets}
    if not any(weights.values()):
        raise UserError("--target-weights: every target has weight zero, so no token would have a value")
    return weights
