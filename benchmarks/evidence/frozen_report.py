"""Tables of masks that are made once and kept: what `score` and `mask` do."""

from benchmarks.evidence.report import DEFAULT, against_full, set_names, table, wins, with_share_closed
from benchmarks.evidence.results import Results

FROZEN = {
    f"{DEFAULT}, once at the start, no preconditioner": "`suspect`, scored at the start, plain direction",
    f"{DEFAULT}, once at the start": "the same along AdamW's direction",
    "surprising tokens in excess and rows, once at the start": "`surprising`, at the start",
    f"{DEFAULT}, once at step 12": "`suspect`, scored after 12 steps, along AdamW's direction",
    DEFAULT: "`suspect` in rounds, every 12 steps",
    "exact, worst 20%, once at the start": "lowest fifth by value, at the start",
    "exact, worst 20%, once at step 12": "lowest fifth by value, after 12 steps",
}


def frozen(results: Results) -> str:
    """Held-out loss minus full SFT by set."""
    names, rows = set_names(results), []
    for rule, said in FROZEN.items():
        cells = []
        for name in names:
            differences = against_full(results, name, rule)
            cells += [with_share_closed(results, name, rule), wins(differences) if differences else ""]
        rows.append([said, *cells])
    columns = [cell for name in names for cell in (f"{name}: minus full SFT", "better in")]
    return table(["mask", *columns], rows)
