"""Tables of masks that are made once and kept: what `score` and `mask` do."""

from benchmarks.evidence.report import DEFAULT, FULL, Results, difference, mean, percent, share_closed, table, wins
from benchmarks.evidence.stats import paired

FROZEN = {
    f"{DEFAULT}, once at the start, no preconditioner": "`suspect`, scored at the start, plain direction",
    f"{DEFAULT}, once at the start": "the same along AdamW's direction",
    "surprising tokens in excess and rows, once at the start": "`surprising`, at the start",
    f"{DEFAULT}, once at step 12": "`suspect`, scored after 12 steps, along AdamW's direction",
    DEFAULT: "`suspect` in rounds, every 12 steps",
    "exact, worst 20%, once at the start": "lowest fifth by value, at the start",
    "exact, worst 20%, once at step 12": "lowest fifth by value, after 12 steps",
}
SETS = ("clean", "tokens", "mixed")


def frozen(results: Results) -> str:
    """Held-out loss minus full SFT by set."""
    rows = []
    for rule, said in FROZEN.items():
        cells = []
        for name in (name for name in SETS if name in results.runs):
            differences = paired(results.losses(name, rule), results.losses(name, FULL))
            closed = share_closed(results, name, rule)
            text = difference(differences) + (f" ({closed})" if closed else "")
            cells += [text, wins(differences) if differences else ""]
        rows.append([said, *cells])
    columns = [cell for name in SETS if name in results.runs for cell in (f"{name}: minus full SFT", "better in")]
    return table(["mask", *columns], rows)


def long_runs(results: Results) -> str:
    """Rules of more than two epochs against full SFT of as many steps."""
    long = Results(results.long)
    rows = []
    for name, rules in long.runs.items():
        full = long.losses(name, FULL)
        for rule in rules:
            losses = long.losses(name, rule)
            against = ["", "", ""]
            if rule != FULL:
                differences = paired(losses, full)
                against = [difference(differences), wins(differences), share_closed(long, name, rule)]
            dropped = percent(long.field(name, rule, "detection", "dropped"))
            rows.append([name, rule, str(len(losses)), mean(losses), *against, dropped])
    columns = ["set", "rule", "seeds", "held-out loss", "minus full SFT", "better in", "gap closed", "dropped"]
    return table(columns, sorted(rows, key=lambda row: (row[0], row[3])))
