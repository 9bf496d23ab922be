"""How well each signal finds the noise: AUROC by token and by row, at two checkpoints of full SFT."""

import numpy as np

from alphatoken.suspects import row_means
from benchmarks.evidence import stats
from benchmarks.evidence.data import Row
from benchmarks.evidence.grid import EXACT, EXACT_3, EXCESS, LOSS, PLAIN, PROPAGATION_3, SEQUENCE
from benchmarks.evidence.runs import Lab
from benchmarks.evidence.signals import Scorer, Signal, Values

SIGNALS = {
    "exact, AdamW direction": EXACT,
    "exact, AdamW direction of unit rows": SEQUENCE,
    "exact, plain direction": PLAIN,
    "exact K=3, AdamW direction": EXACT_3,
    "value propagation K=3, AdamW direction": PROPAGATION_3,
    "value propagation K=3, plain direction": Signal("value_propagation", "last-layers:3", preconditioner="none"),
    "loss, high": LOSS,
    "entropy, high": Signal("entropy"),
    "excess loss": EXCESS,
    "random": Signal("random"),
}
STEPS = (12, 24)
WINDOW_STEPS = 12  # rows of the next 12 steps are looked at


def detect(lab: Lab, name: str, seed: int) -> dict:
    """AUROC of every signal: low values (high loss, high entropy) should be noise."""
    task = lab.load_task(name, seed)
    size = lab.study.training.rows_per_step
    found: dict[str, list[dict]] = {signal: [] for signal in SIGNALS}
    combined = []
    lab.trainer.reset()
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            rows = task.train[step * size : (step + WINDOW_STEPS) * size]
            scorer = Scorer(lab.scoring, task.validation, lab.trainer.moments, lab.end_of_turn, seed)
            values = {label: scorer.values(signal, rows) for label, signal in SIGNALS.items()}
            for label, value in values.items():
                sign = 1.0 if label.endswith("high") else -1.0
                found[label].append(
                    areas(rows, value, sign * value.value, sign * row_means(value.value, value.offsets))
                )
            both = values["exact, AdamW direction"]
            combined.append(areas(rows, both, stats.ranks(both.loss) - stats.ranks(both.value), row_mix(both)))
        lab.trainer.step(task.train[step * size : (step + 1) * size])
    found["ranks of loss and exact value, AdamW direction"] = combined
    return {"steps": list(STEPS), "auroc": found}


def row_mix(values: Values) -> np.ndarray:
    return stats.ranks(row_means(values.loss, values.offsets)) - stats.ranks(row_means(values.value, values.offsets))


def areas(rows: list[Row], values: Values, token_scores: np.ndarray, row_scores: np.ndarray) -> dict[str, float]:
    """AUROC over tokens, over rows, and over rows against each kind of noise alone."""
    noise = np.concatenate([row.response_noise for row in rows])
    kinds = np.array([row.kind for row in rows])
    found = {
        "token": stats.auroc(token_scores, noise),
        "row": stats.auroc(row_scores, kinds != "clean"),
    }
    for kind in sorted(set(kinds) - {"clean"}):
        chosen = (kinds == kind) | (kinds == "clean")
        found[f"row, {kind}"] = stats.auroc(row_scores[chosen], kinds[chosen] == kind)
    return found
