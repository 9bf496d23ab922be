"""The tables of the study of flipped pairs, from the JSON of its finished runs."""

from benchmarks.evidence.report import cost_of, difference, mean, percent, table
from benchmarks.evidence.results import Runs, by_seed
from benchmarks.evidence.stats import gap_closed, paired

FULL, ORACLE = "full", "oracle"


def blocks(runs: Runs, clean: Runs) -> dict[str, str]:
    """Tables by name. clean: runs without flipped pairs."""
    found = {"preference": runs, "preference, clean": clean}
    return {name: rules(of_set) for name, of_set in found.items() if of_set}


def rules(runs: Runs) -> str:
    """Every rule against full DPO at equal steps, best first."""
    figures = {
        rule: [held_out(of_rule, "dpo_loss"), held_out(of_rule, "reward_accuracy"), by_seed(of_rule, "text_loss")]
        for rule, of_rule in runs.items()
    }
    base = figures.get(FULL, [{}, {}, {}])
    rows = []
    for rule, of_rule in runs.items():
        pairs = [paired(own, full) for own, full in zip(figures[rule], base, strict=True)]
        loss, accuracy, text = ("" if rule == FULL else difference(found) for found in pairs)
        losses, reward, _ = figures[rule]
        rows.append((sum(losses.values()) / len(losses), [
            rule,
            str(len(of_rule)),
            mean(losses),
            loss,
            share_closed(runs, rule),
            percent(reward),
            accuracy,
            text,
            *("" if rule == FULL else percent(found) for found in dropped(of_rule)),
            cost_of(of_rule),
        ]))  # fmt: skip
    columns = [
        "rule", "seeds", "held-out DPO loss", "minus full", "oracle's gap closed", "reward accuracy", "minus full",
        "general text loss minus full", "dropped", "of it flipped", "of flipped dropped", "CPU s train + score",
    ]  # fmt: skip
    return table(columns, [row for _, row in sorted(rows)])


def dropped(of_rule: dict[int, dict]) -> list[dict[int, float]]:
    """Shares of pairs, or where no pair was dropped of tokens: dropped, of it flipped, of the flipped dropped."""
    kind = "pair" if any(by_seed(of_rule, "detection", "dropped_pairs").values()) else "token"
    names = (f"dropped_{kind}s", f"{kind}_precision", f"{kind}_recall")
    return [by_seed(of_rule, "detection", name) for name in names]


def held_out(of_rule: dict[int, dict], key: str) -> dict[int, float]:
    """After the last step, by seed."""
    return {seed: run["held_out"][max(run["held_out"], key=int)][key] for seed, run in of_rule.items()}


def share_closed(runs: Runs, rule: str) -> str:
    """Share of the distance from full DPO to the oracle over the seeds that all three have."""
    found = [held_out(runs.get(name, {}), "dpo_loss") for name in (rule, FULL, ORACLE)]
    shared = sorted(set.intersection(*map(set, found)))
    if not shared or rule in (FULL, ORACLE):
        return ""
    closed = gap_closed(*(sum(losses[seed] for seed in shared) / len(shared) for losses in found))
    return "" if closed != closed else f"{100 * closed:.0f}%"
