"""The columns of every table, from the schemas: a Sphinx extension, as configuration.py."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
from sphinx.application import Sphinx

from alphatoken import schema
from alphatoken.columns import meaning, type_name

PAGE, PLACE = "columns", "<!-- generated: columns -->"
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


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _fill)
    app.connect("env-get-outdated", lambda *_: [PAGE])  # the code may have changed where the page has not
    return {"parallel_read_safe": True}


def _fill(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == PAGE:
        source[0] = source[0].replace(PLACE, "\n".join(_tables()))


def _tables() -> Iterator[str]:
    for title, fields in TABLES.items():
        yield f"## {title}\n"
        yield "| column | type | meaning |"
        yield "| --- | --- | --- |"
        yield from (f"| `{field.name}` | `{type_name(field)}` | {meaning(field.name)} |" for field in fields)
        yield ""
