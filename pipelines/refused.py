"""Rows of small inputs (validation rows, prompts of the Fisher) that cannot be used: told, counted, kept in a table."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from alphatoken import schema, storage
from alphatoken.readers import ROWS_PER_FILE, ReadUnit

logger = logging.getLogger(__name__)

MAX_REASONS = 3


@dataclass(frozen=True)
class Refused:
    """One row, with where it is and why it is not used."""

    row_id: int
    id: str
    source: str
    position: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}, row {self.position}: {self.reason}"


def died(units: list[ReadUnit], deadly: dict[int, str]) -> list[Refused]:
    """Of {row id: reason} of rows that processes died on."""
    paths = {unit.file_index: unit.path for unit in units}
    found = []
    for row_id, reason in sorted(deadly.items()):
        source, position = paths[row_id // ROWS_PER_FILE], row_id % ROWS_PER_FILE
        found.append(Refused(row_id, f"{storage.name_of(source)}:{position}", source, position, reason))
    return found


def report_refused(what: str, used: int, refused: Sequence[Refused | str]) -> None:
    """Say how many were left out, and why the first ones were."""
    if refused:
        logger.warning("%d %s rows used, %d left out %s", used, what, len(refused), reasons(refused))


def reasons(refused: Sequence[Refused | str]) -> str:
    """The first few, in brackets; nothing where no row was refused."""
    return f"({'; '.join(map(str, refused[:MAX_REASONS]))})" if refused else ""


def quarantine_uri(output: str) -> str:
    """Of a stage whose output is one file."""
    return f"{output}.quarantine.parquet"


def write_refused(output: str, stage: str, refused: Sequence[Refused]) -> None:
    """The quarantine table beside the one file that `stage` writes; none where no row was refused."""
    if refused:
        records = [asdict(row) | {"stage": stage} for row in refused]
        storage.write_table(pa.Table.from_pylist(records, schema=schema.QUARANTINE), quarantine_uri(output))
    else:
        storage.remove_file(quarantine_uri(output))
