"""DPO on preference pairs of which a third is flipped: does dropping tokens or pairs by value help?

Values are the library's pair values: exact, along the AdamW-preconditioned gradient of the DPO loss of clean
validation pairs, at the current weights, in windows. A dropped token gives no gradient (the log-ratios stay those of
whole responses); a dropped pair is left out of its step. Measured on held-out clean pairs: DPO loss, reward accuracy
(share of pairs with s > 0), and the loss of general text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from alphatoken import schema
from alphatoken.direction import GradientOptions, Tensors, adam_scale, mean_gradient
from alphatoken.exact import Exact
from alphatoken.pair_direction import PairWeights
from alphatoken.pair_encode import PairEncoder
from alphatoken.pair_scoring import PairEstimator, score_pair_table
from alphatoken.scoring import lists
from alphatoken.selection import keep_count, keep_tokens, row_thresholds
from benchmarks.evidence import stats
from benchmarks.evidence.costs import Clock, Costs
from benchmarks.evidence.data import read_lines
from benchmarks.evidence.pairs import (
    BATCH_TOKENS,
    Pair,
    PairTask,
    Reference,
    add_dpo_gradient,
    dpo_losses,
    make_pair_task,
    margins,
    pair_batches,
    short_pairs,
)
from benchmarks.evidence.runs import Lab, Study
from benchmarks.evidence.suffix import frozen_copy
from benchmarks.evidence.training import Training

Masks = tuple[np.ndarray, np.ndarray]  # bool: chosen tokens, rejected tokens
Kept = dict[int, Masks | None]  # by row id; None: the pair is dropped; missing: everything is kept


@dataclass(frozen=True)
class Preference:
    """What all runs share; part of every result's key."""

    study: Study = field(default_factory=lambda: Study(test_rows=1, questions=0, training=Training(rate=5e-5)))
    data: str = "style_pref_1k"
    longest: int = 200  # tokens of a row
    pairs: int = 192
    flipped: float = 1 / 3
    validation_pairs: int = 24
    held_out: int = 128  # the first pairs of the file, the same for all seeds
    beta: float = 0.1
    steps: int = 48
    warmup: int = 12
    refresh: int = 12
    measure_at: tuple[int, ...] = (24, 48)


@dataclass(frozen=True)
class PairRule:
    """choose: all; oracle (flipped pairs are dropped, from the first step); tokens or pairs of a window by `signal`."""

    name: str
    choose: str = "all"
    signal: str = "value"  # value | loss | random
    keep: float = 1.0


FULL = PairRule("full")
ORACLE = PairRule("oracle", "oracle")
THIRD = 2 / 3
PAIR_RULES = [
    FULL,
    ORACLE,
    PairRule("values, worst 20% of tokens", "tokens", keep=0.8),
    PairRule("values, worst 20% of pairs", "pairs", keep=0.8),
    PairRule("values, worst 33% of pairs", "pairs", keep=THIRD),
    PairRule("DPO loss, highest 33% of pairs", "pairs", "loss", THIRD),
    PairRule("random 33% of pairs", "pairs", "random", THIRD),
]
CLEAN_PAIR_RULES = [rule for rule in PAIR_RULES if rule.choose == "pairs" or rule == FULL]  # where no pair is flipped


@dataclass(frozen=True)
class PairValues:
    """Of a window: value of every token, chosen and rejected apart, and of every pair its mean over both."""

    chosen: list[np.ndarray]
    rejected: list[np.ndarray]
    mean: np.ndarray


class PreferenceLab:
    """Model, pairs and measures, loaded once; `run` gives a result as JSON values."""

    def __init__(self, data_dir: Path, settings: Preference) -> None:
        self.settings = settings
        self.lab = Lab(data_dir, settings.study)
        encoder = PairEncoder(self.lab.source.encoder)
        rows = read_lines(data_dir / f"{settings.data}/train.jsonl.gz")
        pairs = short_pairs(encoder, rows, settings.longest)
        self.held_out, self.pairs = pairs[: settings.held_out], pairs[settings.held_out :]
        self.lab.trainer.reset()
        self.start = frozen_copy(self.lab.scoring)
        self.reference = Reference()
        self.reference.add(self.start, self.held_out)
        self.seed: int | None = None

    def load_task(self, seed: int) -> PairTask:
        """Pairs of a seed, with what the reference makes of them; the shared start of the last seed is forgotten."""
        if self.seed != seed:
            settings = self.settings
            self.task = make_pair_task(self.pairs, seed, settings.pairs, settings.validation_pairs, settings.flipped)
            self.reference.add(self.start, [*self.task.train, *self.task.validation])
            self.warm: tuple[dict, Costs] | None = None
            self.seed = seed
        return self.task

    def run(self, seed: int, rule: PairRule) -> dict:
        """Train under `rule`; held-out loss and accuracy at the steps of `measure_at`, general text after the last."""
        settings, task, trainer = self.settings, self.load_task(seed), self.lab.trainer
        size = settings.study.training.rows_per_step
        costs, found, record, kept = Costs(), {}, [], {}
        trainer.reset()
        start = 0 if rule.choose == "oracle" else settings.warmup
        if start:
            self._warm_up(task, costs)
        for step in range(start, settings.steps):
            part = _in_turn(task.train, step, size)
            if rule.choose == "oracle":
                kept = {pair.row_id: None for pair in part if pair.flipped}
            elif rule.choose != "all" and (step - start) % settings.refresh == 0:
                count = min(settings.refresh, settings.steps - step)
                window = [pair for ahead in range(count) for pair in _in_turn(task.train, step + ahead, size)]
                kept = self._judge(rule, window, seed, step, costs)
            self._step(part, kept, costs)
            record += [(pair, kept.get(pair.row_id, everything(pair))) for pair in part]
            if step + 1 in settings.measure_at:
                found[step + 1] = self._measure()
        return {
            "held_out": found,
            "text_loss": self.lab.measures.retention(self.lab.scoring, False)["text_loss"],
            **costs.summary(),
            "detection": dropped_summary(record),
        }

    def _warm_up(self, task: PairTask, costs: Costs) -> None:
        """Plain steps, run once for all rules of a seed."""
        trainer = self.lab.trainer
        if self.warm is None:
            shared = Costs()
            for step in range(self.settings.warmup):
                self._step(_in_turn(task.train, step, self.settings.study.training.rows_per_step), {}, shared)
            self.warm = trainer.state(), shared
        state, shared = self.warm
        trainer.restore(state)
        costs.add("train", shared.cpu["train"], shared.wall["train"])

    def _step(self, part: Sequence[Pair], kept: Kept, costs: Costs) -> None:
        masks = [kept.get(pair.row_id, everything(pair)) for pair in part]
        used = [(pair, mask) for pair, mask in zip(part, masks, strict=True) if mask is not None]
        with Clock() as clock:
            self.lab.trainer.update(lambda: self._add_gradient(used))
        costs.add("train", clock.cpu, clock.wall)

    def _add_gradient(self, used: list[tuple[Pair, Masks]]) -> float:
        if not used:
            return float("nan")
        kept = torch.from_numpy(np.concatenate([mask[side] for side in range(2) for _, mask in used]))
        return add_dpo_gradient(
            self.lab.scoring, [pair for pair, _ in used], kept, self.reference, self.settings.beta
        )  # fmt: skip

    def _judge(self, rule: PairRule, window: list[Pair], seed: int, step: int, costs: Costs) -> Kept:
        """What is kept of the pairs of a window."""
        with Clock() as clock:
            if rule.signal == "value":
                values = self.values(window)
                kept = keep_pair_tokens(window, values, rule.keep) if rule.choose == "tokens" else None
                scores = values.mean
            elif rule.signal == "loss":
                kept, scores = None, -dpo_losses(self._margins(window))
            else:
                kept, scores = None, np.random.default_rng([seed, 2, step]).random(len(window))
            kept = best_pairs(window, scores, rule.keep) if kept is None else kept
        costs.add("score", clock.cpu, clock.wall)
        return kept

    def values(self, window: list[Pair]) -> PairValues:
        """Exact values at the current weights by the library's pair scoring."""
        scoring, beta = self.lab.scoring, self.settings.beta
        direction = self._direction()
        estimator = PairEstimator(Exact(scoring, "all-linear", direction), scoring, self.start)
        table, failures, _ = score_pair_table(
            pair_table(window), estimator, BATCH_TOKENS, scoring.device, beta
        )  # fmt: skip
        if failures:
            raise ValueError(f"pairs without values: {failures}")
        return PairValues(
            lists(table["chosen_adaptation"]), lists(table["rejected_adaptation"]), table["mean_adaptation"].to_numpy()
        )

    def _direction(self) -> Tensors:
        scoring, validation = self.lab.scoring, self.task.validation
        batches = (batch for _, batch in pair_batches(validation))
        weigh = PairWeights(scoring, self.start, self.settings.beta)
        gradient = mean_gradient(scoring, batches, GradientOptions("all-linear"), weigh).tensors
        scale = adam_scale(self.lab.trainer.moments())
        return {name: tensor * scale[name] for name, tensor in gradient.items()}

    def _margins(self, pairs: Sequence[Pair]) -> np.ndarray:
        return margins(self.lab.scoring, pairs, self.reference, self.settings.beta)

    def _measure(self) -> dict[str, float]:
        found = self._margins(self.held_out)
        return {"dpo_loss": float(dpo_losses(found).mean()), "reward_accuracy": float((found > 0).mean())}


def _in_turn(pairs: list[Pair], step: int, size: int) -> list[Pair]:
    """The pairs of a step; past the last one, from the first again."""
    return [pairs[i % len(pairs)] for i in range(step * size, (step + 1) * size)]


def everything(pair: Pair) -> Masks:
    """All tokens are kept."""
    return np.ones(len(pair.ids.chosen_ids), dtype=bool), np.ones(len(pair.ids.rejected_ids), dtype=bool)


def pair_table(pairs: Sequence[Pair]) -> pa.Table:
    """Pairs as the rows that `alphatoken score` reads."""
    rows = [
        {"row_id": pair.row_id, "id": str(pair.row_id), "prompt_ids": pair.ids.prompt_ids, "truncated": False}
        | {"chosen_ids": pair.ids.chosen_ids, "rejected_ids": pair.ids.rejected_ids}
        for pair in pairs
    ]
    return pa.Table.from_pylist(rows, schema=schema.ENCODED_PAIRS)


def keep_pair_tokens(pairs: Sequence[Pair], values: PairValues, keep: float) -> Kept:
    """Tokens of the highest values; one threshold over the window for each branch, as the paper has it."""
    masks = []
    for branch in (values.chosen, values.rejected):
        flat = np.concatenate(branch).astype(np.float32)
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in branch])])
        threshold = float(row_thresholds(flat, np.array([0, len(flat)]), keep)[0])
        masks.append(np.split(keep_tokens(flat, offsets, keep, threshold=threshold), offsets[1:-1]))
    return {pair.row_id: (chosen, rejected) for pair, chosen, rejected in zip(pairs, *masks, strict=True)}


def best_pairs(pairs: Sequence[Pair], scores: np.ndarray, keep: float) -> Kept:
    """Drops all but the pairs with the highest scores."""
    best = set(np.argsort(-scores, kind="stable")[: int(keep_count(keep, len(pairs)))].tolist())
    return {pair.row_id: None for i, pair in enumerate(pairs) if i not in best}


def dropped_summary(record: list[tuple[Pair, Masks | None]]) -> dict[str, float]:
    """Shares of tokens and pairs that were dropped, and how many of them belong to flipped pairs."""
    flipped = np.array([pair.flipped for pair, _ in record])
    whole = np.array([mask is None for _, mask in record])
    sizes = np.array([sum(map(len, everything(pair))) for pair, _ in record])
    dropped = np.array([
        size if mask is None else sum(int((~side).sum()) for side in mask)
        for size, (_, mask) in zip(sizes, record, strict=True)
    ])  # fmt: skip
    of_flipped = np.repeat(flipped, sizes)
    gone = np.concatenate([np.arange(size) < count for size, count in zip(sizes, dropped, strict=True)])
    names = ("precision", "recall")
    return {
        "flipped": float(flipped.mean()),
        "dropped_pairs": float(whole.mean()),
        "dropped_tokens": float(gone.mean()),
        **{f"pair_{name}": value for name, value in zip(names, stats.precision_recall(whole, flipped), strict=True)},
        **{f"token_{name}": value for name, value in zip(names, stats.precision_recall(gone, of_flipped), strict=True)},
    }
