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
SUSPECT = Rule("suspect tokens and rows", "typical", EXACT, loss_width=3.0, token_quantile=0.9)
SURPRISING = replace(SUSPECT, name="surprising tokens and rows", signal=LOSS, suspect_value=None)
SURPRISING_IN_RUN = replace(SURPRISING, name="surprising tokens and rows, in-run", in_run=True)
EXCESS_RULE = replace(SUSPECT, name="suspect tokens in excess and rows", token_quantile=None, excess=0.5)
SURPRISING_EXCESS = replace(EXCESS_RULE, name="surprising tokens in excess and rows", signal=LOSS, suspect_value=None)
RANDOM_FIFTH = Rule("random 20%", "tokens", RANDOM)

LARGER = 4  # times as many rows, and rows a step
LARGER_STEPS = (48, 51, 54, 57, 60)  # at which full SFT is measured there
LONG_STEPS = (48, 72)  # full SFT goes on, for comparisons at equal compute
ADDED = " + validation rows"


def with_validation(rule: Rule) -> Rule:
    """The 24 validation rows are training rows too: 54 steps, every row once."""
    return replace(rule, name=rule.name + ADDED, with_validation=True, steps=54)


LONG = replace(FULL, steps=max(LONG_STEPS))
RULES = [EXCESS_RULE, SURPRISING_EXCESS]
EARLIER = [SUSPECT, SURPRISING, SURPRISING_IN_RUN]  # which cost something on clean data
NOISY = ("tokens", "mixed")
HEADLINE = dict.fromkeys(NOISY, [FULL, ORACLE, *RULES]) | {"clean": [FULL, *RULES]}
CONTROLS = [*map(with_validation, (FULL, ORACLE, EXCESS_RULE)), RANDOM_FIFTH, FRESH]

TYPICAL = Rule("typical rows", "typical", EXACT, loss_width=2.0, value_width=2.0)
EXCESS_VARIANTS = {
    "in-run": {"in_run": True},
    "6 validation rows": {"known_rows": 6},
    "12 validation rows": {"known_rows": 12},
    "once at the start": {"warmup": 0, "refresh": 48},
    "once at step 12": {"refresh": 48},
    "every 4 steps": {"refresh": 4},
    "K=3": {"signal": EXACT_3},
    "value propagation K=3": {"signal": PROPAGATION_3},
    "no preconditioner": {"signal": PLAIN},
    "once at the start, no preconditioner": {"warmup": 0, "refresh": 48, "signal": PLAIN},  # `score` and `mask`
}
SHARED = {"value propagation K=3": PUBLISHED, "exact K=3": replace(EXACT_3, preconditioner="none")}
SHARED_RULES = [  # as `train --in-run` does: values from the training forward pass
    replace(EXCESS_RULE, name=f"{EXCESS_RULE.name}, in-run, shared {name}", in_run=True, shared=True, signal=signal)
    for name, signal in SHARED.items()
]
ONE_DIRECTION = replace(SHARED_RULES[0], name=f"{SHARED_RULES[0].name}, one direction", refresh=48)  # the cheapest
FULL_LONGER = replace(FULL, name="full, 60 steps", steps=60)  # what it costs, and a little more
LOSSES_IN_RUN = replace(SURPRISING_EXCESS, name=f"{SURPRISING_EXCESS.name}, in-run", in_run=True)  # no values at all
FULL_AS_LONG = replace(FULL, name="full, 54 steps", steps=54)  # what that costs, and a little more
SURPRISING_ONCE = replace(SURPRISING_EXCESS, name=f"{SURPRISING_EXCESS.name}, once at the start", warmup=0, refresh=48)
ROWS_THEN_TOKENS = Rule("rows by value, worst 10%, then tokens, worst 10%", "rows", EXACT, keep=0.9, token_keep=0.9)
PUBLISHED_IN_RUN = replace(
    FRESH, name="value propagation in-run as published, worst 50%", signal=PUBLISHED, keep=0.5, in_run=True,
    shared=True, refresh=1,
)  # fmt: skip
SOFT = replace(FRESH, name="exact, worst 20%, soft weights", soft=True)
WORST_TWENTIETH = replace(FRESH, name="exact, worst 5%", keep=0.95)
FRESHER = replace(FRESH, name="exact, worst 20%, every 4 steps", refresh=4)
VARIANTS = [
    *(replace(EXCESS_RULE, name=f"{EXCESS_RULE.name}, {name}", **how) for name, how in EXCESS_VARIANTS.items()),
    *SHARED_RULES,
    ONE_DIRECTION,
    FULL_LONGER,
    LOSSES_IN_RUN,
    FULL_AS_LONG,
    SURPRISING_ONCE,
    replace(SURPRISING, name="surprising tokens at 95% and rows", token_quantile=0.95),
    TYPICAL,
    Rule("loss, highest 20%", "tokens", LOSS, negate=True),
    replace(FRESH, name="exact, worst 10%", keep=0.9),
    replace(FRESH, name="exact, worst 20%, no preconditioner", signal=PLAIN),
    replace(FRESH, name="value propagation K=3, worst 20%", signal=PROPAGATION_3),
    replace(FRESH, name="value propagation K=3 as published, worst 50%", signal=PUBLISHED, keep=0.5),
    replace(FRESH, name="exact, worst 20%, once at step 12", refresh=48),
    replace(FRESH, name="exact, worst 20%, once at the start", warmup=0, refresh=48),
    replace(FRESH, name="exact, below zero", keep=1.0, min_value=0.0),
    Rule("excess loss, lowest 20%", "tokens", EXCESS),
    replace(FRESH, name="excess loss, lowest 40%", signal=EXCESS, keep=0.6),  # Rho-1
    replace(FRESH, name="excess loss, lowest 40%, once at the start", signal=EXCESS, keep=0.6, warmup=0, refresh=48),
    Rule("rows by value and loss, worst 30%", "rows", EXACT, keep=0.7, loss_share=0.5),
    Rule("rows by value, worst 20%", "rows", EXACT),
    ROWS_THEN_TOKENS,
    replace(FRESH, name="exact, worst 20%, mean of steps 0, 12, 24", warmup=0, checkpoints=(0, 12, 24)),
    PUBLISHED_IN_RUN,
    SOFT,
    replace(FRESH, name="exact, worst 20%, per sequence", scope="sequence"),
    replace(FRESH, name="exact, worst 20%, per class", scope="class"),
    replace(FRESH, name="exact, worst 20%, class means removed", center=True),
    replace(FRESH, name="exact, worst 20%, end-of-turn and digits protected", protect=("end-of-turn", "digits")),
    replace(FRESH, name="exact K=3, worst 20%", signal=EXACT_3),
    replace(FRESH, name="exact, worst 70%", keep=0.3),
    replace(FRESH, name="exact, worst 50%", keep=0.5),
    replace(FRESH, name="exact, worst 30%", keep=0.7),
    WORST_TWENTIETH,
    replace(FRESH, name="exact, worst 20%, directions of unit rows", signal=SEQUENCE),
    FRESHER,
    replace(FRESH, name="exact, worst 20%, every step", refresh=1),
    replace(FULL, name="full, 112 steps", steps=112),
    with_validation(FRESH),
    *EARLIER,
]
IN_RUN = VARIANTS[0]
SHORT = dict.fromkeys(NOISY, [FULL, ORACLE, EXCESS_RULE, RANDOM_FIFTH]) | {"clean": [FULL, EXCESS_RULE]}
ONCE = [rule for rule in VARIANTS if rule.excess is not None and ", once at" in rule.name]  # what `mask` can do
HELPED = [  # on both noisy sets, with seed 0
    next(rule for rule in VARIANTS if rule.excess is not None and rule.refresh == 4),
    ROWS_THEN_TOKENS,
    PUBLISHED_IN_RUN,
    SOFT,
    WORST_TWENTIETH,
    FRESHER,
]
ON_CLEAN = [IN_RUN, *SHARED_RULES, ONE_DIRECTION, FULL_LONGER, LOSSES_IN_RUN, FULL_AS_LONG, *ONCE, *HELPED]


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
    """On noisy sets full SFT goes on past the step at which it is compared."""
    asked = [FULL, ORACLE, EXCESS_RULE] if seed else [*HEADLINE["mixed"], *EARLIER, *CONTROLS]
    choices = name == "mixed" and seed < 3 and rule in asked
    if rule == FULL and name != "clean":
        return Run(name, seed, LONG, LONG_STEPS, LONG_STEPS[0], choices)
    if rule == with_validation(FULL):
        return Run(name, seed, rule, (48, 54), 54, choices)
    return Run(name, seed, rule, (rule.steps,), rule.steps, choices)


def runs(full: bool) -> Iterator[Run]:
    """Full: headline rules and controls on five seeds, then variants on three. Else the default's rule on three."""
    if not full:
        yield from _on_every(range(3), SHORT)
        return
    yield from _on_every(range(5), HEADLINE)
    yield from _on_every(range(5), dict.fromkeys(NOISY, CONTROLS))
    yield from _on_every(range(3), dict.fromkeys(NOISY, VARIANTS) | {"clean": ON_CLEAN})


def larger_runs() -> Iterator[Run]:
    """With more rows a step, where the validation rows weigh less: in-run's default beside full SFT that goes on."""
    for seed in range(3):
        for name in NOISY:
            yield Run(name, seed, FULL_LONGER, LARGER_STEPS, LARGER_STEPS[0])
            yield Run(name, seed, SHARED_RULES[0], (48,), 48)


def _on_every(seeds: range, rules_of: dict[str, list[Rule]]) -> Iterator[Run]:
    for seed in seeds:
        for name, rules in rules_of.items():
            yield from (run_of(name, seed, rule) for rule in rules)
