"""Which runs the study has: rules, sets and seeds, in the order in which they run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.evidence.rules import Rule
from benchmarks.evidence.signals import Signal

LOSS, RANDOM, EXCESS = Signal("loss"), Signal("random"), Signal("excess_loss")
EXACT = Signal()
PLAIN = Signal(preconditioner="none")
EXACT_3 = Signal(parameters="last-layers:3")
PROPAGATION_3 = Signal("value_propagation", "last-layers:3")
PUBLISHED = Signal("value_propagation", "last-layers:3", preconditioner="none")
SEQUENCE = Signal(normalization="sequence")

FULL = Rule("full")
ORACLE = Rule("oracle", "oracle")
FRESH = Rule("exact, worst 20%", "tokens", EXACT)
TYPICAL = Rule("typical rows", "typical", EXACT, loss_width=2.0, value_width=2.0)
SUSPECTS = Rule("suspect tokens", "typical", EXACT, token_quantile=0.9)
TYPICAL_TOKENS = replace(TYPICAL, name="typical rows, no suspect tokens", token_quantile=0.9)
TYPICAL_LOSS = Rule("typical rows, loss only", "typical", LOSS, loss_width=2.0)

LONG_STEPS = (48, 72)  # full SFT goes on, for comparisons at equal compute


def with_validation(rule: Rule) -> Rule:
    """The 24 validation rows are training rows too: 54 steps, every row once."""
    return replace(rule, name=f"{rule.name} + validation rows", with_validation=True, steps=54)


LONG = replace(FULL, steps=max(LONG_STEPS))
CHOICES = (ORACLE, FRESH, TYPICAL)
CORE = [LONG, ORACLE, FRESH, TYPICAL, SUSPECTS, TYPICAL_TOKENS]
HEADLINE = {
    "mixed": [
        *CORE,
        TYPICAL_LOSS,
        Rule("random 20%", "tokens", RANDOM),
        with_validation(FULL),
        with_validation(TYPICAL_TOKENS),
    ],
    "tokens": CORE,
    "clean": [rule for rule in CORE if rule != ORACLE],
}

VARIANTS = [
    Rule("loss, highest 20%", "tokens", LOSS, negate=True),
    Rule("excess loss, lowest 20%", "tokens", EXCESS),
    Rule("excess loss, worst rows 30%", "rows", EXCESS, keep=0.7),
    replace(TYPICAL, name="typical rows, value only", loss_width=None),
    Rule("rows by value and loss, worst 30%", "rows", EXACT, keep=0.7, loss_share=0.5),
    Rule("rows by value and loss, worst 50%", "rows", EXACT, keep=0.5, loss_share=0.5),
    Rule("rows by value, worst 30%", "rows", EXACT, keep=0.7),
    replace(FRESH, name="exact, worst 20%, per sequence", scope="sequence"),
    replace(FRESH, name="exact, worst 20%, per class", scope="class"),
    replace(FRESH, name="exact, worst 20%, class means removed", center=True),
    replace(FRESH, name="exact, worst 20%, end-of-turn and digits protected", protect=("end-of-turn", "digits")),
    replace(FRESH, name="exact, worst 20%, soft weights", soft=True),
    replace(FRESH, name="exact, worst 30%", keep=0.7),
    replace(FRESH, name="exact, worst 10%", keep=0.9),
    replace(FRESH, name="exact, worst 5%", keep=0.95),
    replace(FRESH, name="exact, below zero", keep=1.0, min_value=0.0),
    replace(FRESH, name="exact, worst 20%, once at step 12", refresh=48),
    replace(FRESH, name="exact, worst 20%, no preconditioner", signal=PLAIN),
    replace(FRESH, name="exact K=3, worst 20%", signal=EXACT_3),
    replace(FRESH, name="value propagation K=3, worst 20%", signal=PROPAGATION_3),
    replace(FRESH, name="value propagation K=3 as published, worst 50%", signal=PUBLISHED, keep=0.5),
    replace(FRESH, name="exact, worst 20%, directions of unit rows", signal=SEQUENCE),
    replace(FRESH, name="exact, worst 20%, once at the start", warmup=0, refresh=48),
    replace(FRESH, name="exact, worst 20%, every 4 steps", refresh=4),
    with_validation(ORACLE),
    with_validation(FRESH),
    with_validation(TYPICAL),
    with_validation(TYPICAL_LOSS),
    replace(SUSPECTS, name="surprising tokens, whatever their value", suspect_value=None),
]


@dataclass(frozen=True)
class Run:
    """One run: where, under which rule, measured at which steps, with multiple choice or without."""

    set: str
    seed: int
    rule: Rule
    measure_at: tuple[int, ...]
    retention_at: int
    choices: bool = False


def run_of(name: str, seed: int, rule: Rule) -> Run:
    """Full SFT goes on past the step at which it is compared."""
    if rule == LONG:
        return Run(name, seed, rule, LONG_STEPS, LONG_STEPS[0], choices=name == "mixed")
    if rule == with_validation(FULL):
        return Run(name, seed, rule, (48, 54), 54)
    return Run(name, seed, rule, (rule.steps,), rule.steps, choices=name == "mixed" and rule in CHOICES)


def runs(full: bool) -> Iterator[Run]:
    """Headline rules on several seeds, variants on one (full: three)."""
    for seed in range(5 if full else 3):
        for name, rules in HEADLINE.items():
            yield from (run_of(name, seed, rule) for rule in rules)
    for seed in range(3 if full else 1):
        yield from (run_of("mixed", seed, rule) for rule in VARIANTS)
