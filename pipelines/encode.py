"""Input files to a stream of encoded rows: CPU tasks, one per read unit, in the order of the file.

A row that cannot be used travels on as a row with a `reason`, so that every row id reaches a commit record.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from alphatoken import schema
from alphatoken.config import DataOptions
from alphatoken.encode import Encoded, Encoder
from alphatoken.errors import BadRowError
from alphatoken.model_encoder import make_encoder
from alphatoken.pair_encode import EncodedPair, PairEncoder
from alphatoken.prompts import PromptReader
from alphatoken.sources import ReadUnit, SourceRow, read_unit
from pipelines.refused import Refused

ROWS_PER_TABLE = 8  # what a block can be larger than it was meant to be
# What the rest of the pipeline needs to know of a row beside its tokens; gone in the output.
ORIGIN = [
    pa.field("source", pa.string()),
    pa.field("position", pa.int64()),
    pa.field("reason", pa.string()),  # null: the row is good
    pa.field("special_tokens", pa.bool_()),  # whether special tokens are written in its text
]

KEPT = "kept: "  # before the names of kept columns while they travel: an input may have a column called `source`

ENCODED_AS = {"rows": schema.ENCODED, "pairs": schema.ENCODED_PAIRS, "prompts": schema.ENCODED_PROMPTS}


@dataclass(frozen=True)
class EncodePlan:
    """Everything that an encoding task needs; small, sent to every task."""

    model: str
    trust_remote_code: bool
    options: DataOptions
    keep_columns: tuple[str, ...] = ()
    finished: tuple[tuple[int, int], ...] = ()  # runs of row ids that an earlier attempt has committed
    kind: str = "rows"  # rows with responses; pairs: preference pairs; prompts: prompts with an answer
    longest_prompt: int = 0  # prompts: in tokens

    @property
    def arrow_schema(self) -> pa.Schema:
        kept = [pa.field(KEPT + name, pa.string()) for name in self.keep_columns]
        return pa.schema([*ENCODED_AS[self.kind], *kept, *ORIGIN])


def encoded_dataset(units: list[ReadUnit], plan: EncodePlan, block_bytes: int) -> ray.data.Dataset:
    """A lazy Dataset of `plan.arrow_schema`; blocks of about `block_bytes`, each a run of consecutive rows."""
    dataset = ray.data.from_items([{"unit": index} for index in range(len(units))], override_num_blocks=len(units))
    dataset.context.target_max_block_size = block_bytes
    # A CPU share of its own keeps Ray from fusing this stage into the scoring actors.
    return dataset.map_batches(
        encode_units, batch_size=1, batch_format="numpy", fn_kwargs={"units": units, "plan": plan}, num_cpus=0.5
    )


def encode_units(batch: dict[str, np.ndarray], units: list[ReadUnit], plan: EncodePlan) -> Iterator[pa.Table]:
    """The Ray Data stage."""
    encoder = make_encoder(plan.model, plan.options, plan.trust_remote_code)
    if plan.kind == "prompts":
        encode = prompt_columns(PromptReader(encoder, plan.longest_prompt))
    else:
        encode = pair_columns(PairEncoder(encoder)) if plan.kind == "pairs" else row_columns(encoder)
    for index in batch["unit"]:
        rows = unfinished(read_unit(units[int(index)]), plan.finished)
        records: list[dict] = []
        for row in rows:
            records.append(encode_row(row, encode, plan.keep_columns))
            if len(records) == ROWS_PER_TABLE:
                yield pa.Table.from_pylist(records, schema=plan.arrow_schema)
                records = []
        if records:
            yield pa.Table.from_pylist(records, schema=plan.arrow_schema)


@dataclass(frozen=True)
class RowColumns:
    """How the data of a row becomes columns, and those columns of a row without usable data."""

    encode: Callable[[dict], Any]  # to a dataclass with the columns as fields
    empty: dict[str, Any]
    encoder: Encoder  # of `encode`


def row_columns(encoder: Encoder) -> RowColumns:
    return RowColumns(encoder.encode, vars(Encoded([], [], False)), encoder)


def pair_columns(encoder: PairEncoder) -> RowColumns:
    return RowColumns(encoder.encode, vars(EncodedPair([], [], [], False)), encoder.encoder)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and what its response is compared with."""

    prompt_ids: list[int]
    answer: str
    truncated: bool = False


def prompt_columns(reader: PromptReader) -> RowColumns:
    def encode(row: dict) -> EncodedPrompt:
        found = reader.read(row)
        if found.answer is None:
            raise BadRowError("the row has no answer that a response could be compared with")
        return EncodedPrompt(found.prompt_ids, found.answer)

    return RowColumns(encode, vars(EncodedPrompt([], "")), reader.encoder)


def encode_row(row: SourceRow, columns: RowColumns, keep_columns: Iterable[str] = ()) -> dict:
    """One record of the stream; `reason` says why a row is unusable."""
    record = {
        "row_id": row.row_id,
        "id": row_name(row, columns.encoder.options.columns.get("id", "id")),
        "source": row.source,
        "position": row.position,
        "reason": row.error,
        "special_tokens": False,
        **columns.empty,
    }
    if row.data is None:
        return record
    record |= {KEPT + name: _as_text(row.data.get(name)) for name in keep_columns}
    try:
        record |= vars(columns.encode(row.data))
    except BadRowError as error:
        record["reason"] = str(error)
    return record | {"special_tokens": columns.encoder.typed is not None}


def row_name(row: SourceRow, column: str = "id") -> str:
    """The row's own id, else its place."""
    own = None if row.data is None else row.data.get(column)
    return f"{row.source.rsplit('/', 1)[-1]}:{row.position}" if own in (None, "") else str(_as_text(own))


def good_rows(
    units: list[ReadUnit], encode: Callable[[dict], Any], refused: list[Refused], columns: dict[str, str] | None = None
) -> Iterator[tuple[int, Any]]:
    """(row id, what `encode` makes of it) of the usable rows; the others are added to `refused`, under the names that
    rows have in `columns`.
    """
    id_column = (columns or {}).get("id", "id")
    for unit in units:
        for row in read_unit(unit):
            try:
                if row.data is None:
                    raise BadRowError(row.error)
                yield row.row_id, encode(row.data)
            except BadRowError as error:
                refused.append(Refused(row.row_id, row_name(row, id_column), row.source, row.position, str(error)))


def unfinished(rows: Iterator[SourceRow], finished: tuple[tuple[int, int], ...]) -> Iterator[SourceRow]:
    firsts = np.array([first for first, _ in finished], dtype=np.int64)
    lasts = np.array([last for _, last in finished], dtype=np.int64)
    for row in rows:
        place = int(np.searchsorted(firsts, row.row_id, side="right")) - 1
        if place < 0 or row.row_id > lasts[place]:
            yield row


def _as_text(value: object) -> str | None:
    """Carried columns are strings, so that files with different types make one table."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
