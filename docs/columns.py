"""The columns of every table, from the schemas: see generated.py."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from alphatoken import schema
from alphatoken.columns import meaning, type_name

TABLES: dict[str, Iterable[pa.Field]] = {
    "Responses (`generate`)": schema.RESPONSES,
    "Pairs (`pair`)": schema.PAIRS,
    "Scored rows (`score`)": schema.SCORED,
    "The paper's terms (`score --terms`)": [pa.field(name, pa.list_(pa.float32())) for name in schema.TERMS],
    "Masked rows (`mask`): those of scored rows, and": [*schema.MASKED_EXTRA, schema.WEIGHTS],
    "Scored pairs (`score`)": schema.SCORED_PAIRS,
    "Masked pairs (`mask`): those of scored pairs, and": schema.MASKED_PAIRS_EXTRA,
    "Windows (`rounds`): those of masked rows or pairs, and": schema.WINDOW_EXTRA,
    "Quarantine (all of them)": schema.QUARANTINE,
}


def tables() -> str:
    """All tables, as Markdown."""
    return "\n".join(_tables())


def _tables() -> Iterator[str]:
    for title, fields in TABLES.items():
        yield f"## {title}\n"
        yield "| column | type | meaning |"
        yield "| --- | --- | --- |"
        yield from (f"| `{field.name}` | `{type_name(field)}` | {meaning(field.name)} |" for field in fields)
        yield ""
