"""Tables (Markdown) from the JSON of finished runs. No figure is written by hand."""

import math
import re
from collections.abc import Collection

from benchmarks.evidence import grid
from benchmarks.evidence.grid import ADDED
from benchmarks.evidence.results import Results, by_seed
from benchmarks.evidence.stats import gap_closed, mean_interval, paired

FULL, ORACLE, DEFAULT = grid.FULL.name, grid.ORACLE.name, grid.EXCESS_RULE.name


def cost_of(of_rule: dict[int, dict]) -> str:
    """Mean CPU seconds of training and of scoring."""
    parts = [by_seed(of_rule, "cpu_seconds", purpose) for purpose in ("train", "score")]
    return " + ".join(mean_seconds(part.values()) for part in parts if part)


def mean_seconds(seconds: Collection[float]) -> str:
    return f"{sum(seconds) / len(seconds):.0f}" if seconds else ""


def all_cpu(run: dict) -> float:
    """CPU seconds of training and scoring."""
    return sum(run["cpu_seconds"].values())


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def mean(values: dict[int, float]) -> str:
    return f"{sum(values.values()) / len(values):.3f}" if values else ""


def difference(differences: list[float]) -> str:
    return with_interval(differences, ".4f", "+")


def with_interval(values: list[float], form: str, sign: str = "") -> str:
    """Mean and 95% interval over seeds; a single seed has none."""
    if not values:
        return ""
    value, width = mean_interval(values)
    return f"{value:{sign}{form}}" + ("" if math.isnan(width) else f" ± {width:{form}}")


def wins(differences: list[float]) -> str:
    """Runs that are better by more than rounding: one in which nothing was dropped is none."""
    return f"{sum(d < -1e-6 for d in differences)} of {len(differences)}"


def steps_cpu(run: dict, steps: int) -> float:
    """CPU seconds of training up to a step, from the run's mean per step."""
    return run["cpu_seconds"]["train"] * steps / run["run"]["rule"]["steps"]


def is_compared(rule: str) -> bool:
    """Whether it stands beside full SFT of 48 steps: not full SFT of any length, nor with the validation rows added."""
    return not rule.startswith(FULL) and not rule.endswith(ADDED)


def headline(results: Results, name: str) -> str:
    """Every rule of a set against full SFT at equal steps, best first."""
    full = results.losses(name, FULL)
    rows = []
    for rule in results.runs[name]:
        if rule != FULL and not is_compared(rule):
            continue
        losses = results.losses(name, rule)
        differences = paired(losses, full)
        if not differences:
            continue
        closed = share_closed(results, name, rule)
        text = paired(
            results.field(name, rule, "retention", "text_loss"), results.field(name, FULL, "retention", "text_loss")
        )
        found = [results.field(name, rule, "detection", key) for key in ("dropped", "precision", "recall")]
        rows.append((
            sum(differences) / len(differences),
            [
                rule,
                str(len(differences)),
                mean(losses),
                "" if rule == FULL else difference(differences),
                "" if rule == FULL else wins(differences),
                closed,
                "" if rule == FULL else difference(text),
                *("" if rule == FULL else percent(values) for values in found),
                cost(results, name, rule),
            ],
        ))  # fmt: skip
    columns = [
        "rule", "seeds", "held-out loss", "minus full SFT", "better in", "oracle's gap closed",
        "general text loss minus full", "dropped", "of it noise", "of noise dropped", "CPU s train + score",
    ]  # fmt: skip
    return table(columns, [row for _, row in sorted(rows, key=lambda row: row[0])])


def percent(values: dict[int, float]) -> str:
    """Mean, rounded."""
    return f"{100 * sum(values.values()) / len(values):.0f}%" if values else ""


def cost(results: Results, name: str, rule: str) -> str:
    runs = results.runs[name][rule].values()
    train = [steps_cpu(run, 48) if rule == FULL else run["cpu_seconds"]["train"] for run in runs]
    score = [run["cpu_seconds"]["score"] for run in runs]
    return f"{mean_seconds(train)} + {mean_seconds(score)}"


def validation_rows(results: Results, name: str) -> str:
    """Rules when the validation rows are training rows as well, for both sides."""
    base = FULL + ADDED
    rows = []
    for rule in results.runs[name]:
        losses = results.losses(name, rule, 54) if rule.endswith(ADDED) else {}
        if losses:
            differences = paired(losses, results.losses(name, base, 54))
            rows.append([rule, str(len(losses)), mean(losses), "" if rule == base else difference(differences),
                         "" if rule == base else wins(differences), cost(results, name, rule)])  # fmt: skip
    at_48 = results.losses(name, base, 48)
    if at_48:
        rows.append([f"{base}, at 48 steps", str(len(at_48)), mean(at_48), "", "", ""])
    columns = ["rule, 54 steps", "seeds", "held-out loss", f"minus {base}", "better in", "CPU s train + score"]
    return table(columns, sorted(rows, key=lambda row: row[2]))


def equal_compute(results: Results, name: str) -> str:
    """Full SFT with more steps, and what every rule cost."""
    rows = []
    for rule, of_rule in results.runs[name].items():
        if not rule.startswith(FULL) or rule.endswith(ADDED):
            continue
        steps = sorted({int(key) for run in of_rule.values() for key in run["target_loss"]})
        for step in steps:
            losses = results.losses(name, rule, step)
            seconds = [steps_cpu(run, step) for seed, run in of_rule.items() if seed in losses]
            rows.append([f"full SFT, {step} steps", str(len(losses)), mean(losses), mean_seconds(seconds)])
    for rule, of_rule in results.runs[name].items():
        if is_compared(rule):
            losses = results.losses(name, rule)
            seconds = mean_seconds([all_cpu(run) for run in of_rule.values()])
            rows.append([f"{rule}, 48 steps", str(len(losses)), mean(losses), seconds])
    return table(["", "seeds", "held-out loss", "CPU s, scoring included"], sorted(rows, key=lambda r: float(r[3])))


def dropped_by(results: Results, name: str, what: str) -> str:
    """Share of the tokens dropped, by kind of row or class of token."""
    rules = {rule: of_rule for rule, of_rule in results.runs[name].items() if is_compared(rule)}
    keys = sorted({key for runs in rules.values() for run in runs.values() for key in run["detection"].get(what, {})})
    rows = []
    for rule in sorted(rules):
        rows.append([rule, *(percent(results.field(name, rule, "detection", what, key)) for key in keys)])
    return table(["rule", *keys], rows)


def choices(results: Results, name: str) -> str:
    """Accuracy of multiple choice after training, and the difference to full SFT by seed."""
    rows = []
    for rule in results.runs[name]:
        own, full = (
            [results.field(name, which, "retention", key) for key in ("hellaswag", "arc")] for which in (rule, FULL)
        )
        if all(own):
            against = ["" if rule == FULL else difference(paired(*both)) for both in zip(own, full, strict=True)]
            shares = map(percent, own)
            cells = [cell for both in zip(shares, against, strict=True) for cell in both]
            rows.append([rule, str(len(own[0])), *cells])
    return table(["rule", "seeds", "HellaSwag", "minus full", "ARC challenge", "minus full"], rows)


def summary(results: Results) -> str:
    """Held-out loss minus full SFT for every set, and the gap closed; first what does best where it does worst."""
    names = set_names(results)
    rules = filter(is_compared, results.runs["tokens"])
    rows = []
    for rule in sorted(rules, key=lambda rule: _where_worst(results, rule)):
        cells = [with_share_closed(results, name, rule) for name in names]
        rows.append([rule, *cells, cost(results, "tokens", rule)])
    return table(["held-out loss minus full SFT (gap closed)", *names, "CPU s train + score"], rows)


def _where_worst(results: Results, rule: str) -> float:
    """Mean difference to full SFT in units of the oracle's, on the noisy set where that is least."""
    shares = []
    for name in set_names(results):
        oracle, own = (against_full(results, name, key) for key in (ORACLE, rule))
        if oracle and own:
            shares.append((sum(own) / len(own)) / abs(sum(oracle) / len(oracle)))
    return max(shares, default=math.inf)


def number_of_rows(results: Results) -> str:
    """The default rule by how many validation rows it may use."""
    rows = []
    for count, rule in ((6, f"{DEFAULT}, 6 validation rows"), (12, f"{DEFAULT}, 12 validation rows"), (24, DEFAULT)):
        cells = []
        for name in ("tokens", "mixed"):
            differences = against_full(results, name, rule)
            cells += [difference(differences), share_closed(results, name, rule), wins(differences)]
        rows.append([str(count), *cells])
    about = ("minus full SFT", "gap closed", "better in")
    columns = [f"{name}: {what}" for name in ("tokens", "mixed") for what in about]
    return table(["validation rows", *columns], rows)


def set_names(results: Results) -> list[str]:
    """The sets that have runs, clean first."""
    return [name for name in ("clean", "tokens", "mixed") if name in results.runs]


def against_full(results: Results, name: str, rule: str) -> list[float]:
    """Held-out loss minus that of full SFT, by seed."""
    return paired(results.losses(name, rule), results.losses(name, FULL))


def with_share_closed(results: Results, name: str, rule: str) -> str:
    """Mean difference to full SFT, and in brackets the share of the oracle's gap where there is one."""
    closed = share_closed(results, name, rule)
    return difference(against_full(results, name, rule)) + (f" ({closed})" if closed else "")


def share_closed(results: Results, name: str, rule: str) -> str:
    """Share of the oracle's gap over the seeds that all three have."""
    found = [results.losses(name, key) for key in (rule, FULL, ORACLE)]
    shared = sorted(set.intersection(*(set(losses) for losses in found)))
    if not shared or rule in (FULL, ORACLE):
        return ""
    return f"{100 * gap_closed(*(sum(losses[seed] for seed in shared) / len(shared) for losses in found)):.0f}%"


def fill(text: str, blocks: dict[str, str]) -> str:
    """Replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`."""
    for name, block in blocks.items():
        pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, block=block: match[1] + block + match[2], text, flags=re.DOTALL)
    return text


def readme_blocks(results: Results) -> dict[str, str]:
    """The tables that docs/results/README.md shows."""
    blocks = {"summary": summary(results), "number of rows": number_of_rows(results)}
    for name in results.runs:
        blocks[f"validation rows, {name}"] = validation_rows(results, name)
        blocks[f"equal compute, {name}"] = equal_compute(results, name)
        blocks[f"all rules, {name}"] = headline(results, name)
    return blocks


def all_tables(results: Results) -> str:
    """The whole document."""
    parts = ["# Tables\n\nWritten by `python -m benchmarks.evidence` from the JSON files beside this one.\n"]
    for name in sorted(results.runs):
        parts += [f"## {name}: against full SFT at equal steps\n", headline(results, name)]
        if any(rule.endswith(ADDED) for rule in results.runs[name]):
            parts += [f"## {name}: with the validation rows in the training data\n", validation_rows(results, name)]
        parts += [f"## {name}: equal compute\n", equal_compute(results, name)]
        parts += [f"## {name}: share of tokens dropped, by kind of row\n", dropped_by(results, name, "dropped_by_kind")]
        parts += [
            f"## {name}: share of tokens dropped, by token class\n",
            dropped_by(results, name, "dropped_by_class"),
        ]
    parts += ["## Multiple choice after training on the set mixed\n", choices(results, "mixed")]
    return "\n".join(parts)
