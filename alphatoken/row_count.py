"""How many rows there are, for a remaining time: counted without decoding them."""

from alphatoken import storage
from alphatoken.readers import load_data_set, open_input
from alphatoken.sources import file_bytes, plan_units

CHEAP_BYTES = 512 * 2**20  # of text; counting the lines of more would take longer than it is worth
BLOCK = 2**20


def count_rows(sources: list[str], most: int | None = None) -> int | None:
    """Rows of all files, of each at most `most`; empty lines count too. None where counting would take long.

    Raises UserError for sources that cannot be read.
    """
    units = plan_units(sources)
    if file_bytes(units, "jsonl") > CHEAP_BYTES:
        return None
    inputs = {(unit.kind, unit.path) for unit in units}
    counts = [_rows_of(kind, path) for kind, path in inputs]
    return sum(counts if most is None else (min(count, most) for count in counts))


def _rows_of(kind: str, path: str) -> int:
    if kind == "parquet":
        return storage.count_rows(path)
    return _lines(path) if kind == "jsonl" else len(load_data_set(kind, path))


def _lines(path: str) -> int:
    lines, last = 0, b"\n"
    with open_input(path) as stream:
        while block := stream.read(BLOCK):
            lines, last = lines + block.count(b"\n"), block
    return lines + (not last.endswith(b"\n"))
