"""One training run under one rule: schedule, costs, what was dropped, what came out."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from alphatoken.config import DataOptions
from alphatoken.direction import second_moments
from alphatoken.encode import Encoder
from alphatoken.token_classes import TOKEN_CLASS_NAMES, class_ids, token_class_table
from alphatoken.tokenizer import end_of_turn_ids, load_config, load_tokenizer
from benchmarks.evidence import stats
from benchmarks.evidence.costs import Clock, Costs
from benchmarks.evidence.data import Row, Source, Task, batch_of, make_task, read_lines
from benchmarks.evidence.in_run import InRunJudge
from benchmarks.evidence.measure import make_measures
from benchmarks.evidence.rules import FOLDS, Rule, Window, held_out_order, weight_of, weights_of
from benchmarks.evidence.signals import Scorer, Signal, Values
from benchmarks.evidence.suffix import load_suffix
from benchmarks.evidence.training import Trainer, Training

FILES = {
    "train": "gsm8k/train.jsonl.gz",
    "test": "gsm8k/test.jsonl.gz",
    "code": "gpteacher_codegen/train.jsonl.gz",
    "text": "wikitext2/test.jsonl.gz",
    "hellaswag": "hellaswag/val.jsonl.gz",
    "arc": "arc_challenge/test.jsonl.gz",
}


@dataclass(frozen=True)
class Study:
    """What is the same for all runs; part of every result's key."""

    model: str = "smollm2-135m-instruct"
    layers: int = 8  # the last ones, trained and valued; 0: all
    test_rows: int = 96
    text_windows: int = 24
    questions: int = 50
    validation_rows: int = 24
    training: Training = field(default_factory=Training)


class Lab:
    """Model, data and measures, loaded once; `run` gives a result as JSON values."""

    def __init__(self, data_dir, study: Study) -> None:
        self.study = study
        tokenizer, config = load_tokenizer(study.model), load_config(study.model)
        encoder = Encoder(tokenizer, DataOptions(max_length=1024), config.vocab_size)
        self.files = {name: read_lines(data_dir / path) for name, path in FILES.items()}
        self.source = Source(encoder)
        ends = end_of_turn_ids(config, tokenizer)
        self.end_of_turn = sorted(ends)
        self.class_of = class_ids(token_class_table(tokenizer, ends, config.vocab_size))
        held_out = self.source.rows([(row["question"], row["answer"]) for row in self.files["test"]], study.test_rows)
        choices = {"hellaswag": self.files["hellaswag"], "arc": self.files["arc"]}
        self.measures = make_measures(
            encoder, held_out, self.files["text"], choices, study.text_windows, study.questions
        )
        self.scoring = load_suffix(study.model, study.layers)
        self.trainer = Trainer(self.scoring, study.training)
        self.task_key: tuple | None = None

    def load_task(self, name: str, seed: int) -> Task:
        """Rows of a set and seed; shared starts and values of the last task are forgotten."""
        if self.task_key != (name, seed):
            self.task_key = (name, seed)
            self.task = make_task(
                name, seed, self.source, self.files["train"], self.files["code"], self.study.validation_rows,
                max(1, self.study.training.rows_per_step // Training.rows_per_step),
            )  # fmt: skip
            self.starts: dict[tuple, tuple[dict, Costs]] = {}
            self.first_values: dict[tuple, tuple] = {}
            for row in [*self.task.train, *self.task.validation]:  # fill the cache outside every clock
                self.scoring.model.get_input_embeddings()(batch_of([row]).input_ids)
        return self.task

    def run(
        self, name: str, seed: int, rule: Rule, measure_at: tuple[int, ...], retention_at: int, choices: bool
    ) -> dict:
        """Train under `rule`; held-out loss at the steps `measure_at`, retention at `retention_at`."""
        task = self.load_task(name, seed)
        rows = self.order(task, seed, rule)
        known = task.validation[: rule.known_rows]
        scorer = Scorer(self.scoring, known, self.moments(rows), self.end_of_turn, seed)
        size = self.study.training.rows_per_step
        costs, record, losses, retention = Costs(), Record(), {}, {}
        warmup = min(rule.warmup, rule.steps)
        weights: dict[int, np.ndarray] = {}
        if rule.checkpoints:
            weights = self._weigh_averaged(rule, scorer, rows[: rule.steps * size], costs)
        self.start(rows, rule, warmup, costs)
        for step in range(warmup, rule.steps):
            part = rows[step * size : (step + 1) * size]
            if rule.choose == "oracle":
                weights = {row.row_id: (~row.response_noise).astype(np.float32) for row in part if row.row_id >= 0}
            elif rule.in_run and (step - warmup) % rule.refresh == 0:
                judge = InRunJudge(self, rule, scorer, costs)
            elif rule.choose != "all" and not rule.checkpoints and (step - warmup) % rule.refresh == 0:
                window = rows[step * size : (step + rule.refresh) * size]
                weights = self._weigh(rule, scorer, [row for row in window if row.row_id >= 0], costs, step == warmup)
            if rule.in_run:
                weights = judge.train(part)
            else:
                with Clock() as clock:
                    self.trainer.step(part, [weight_of(row, weights) for row in part])
                costs.add("train", clock.cpu, clock.wall)
            record.add(part, weights, self.class_of)
            if step + 1 in measure_at:
                losses[step + 1] = self.measures.target_loss(self.scoring)[0]
            if step + 1 == retention_at:
                retention = self.measures.retention(self.scoring, choices)
        return {
            "target_loss": losses,
            "retention": retention,
            **costs.summary(),
            "detection": record.summary(),
        }

    def order(self, task: Task, seed: int, rule: Rule) -> list[Row]:
        """Rows in training order, further epochs reshuffled. Validation rows get ids below zero: never dropped."""
        rows = list(task.train)
        if rule.with_validation:
            rows += [replace(row, row_id=-1 - i) for i, row in enumerate(task.validation)]
            rows = [rows[i] for i in np.random.default_rng([seed, 3]).permutation(len(rows))]
        order = list(rows)
        while len(order) < rule.steps * self.study.training.rows_per_step:
            order += [rows[i] for i in np.random.default_rng([seed, 4, len(order)]).permutation(len(rows))]
        return order

    def moments(self, rows: list[Row]):
        """The optimizer's second moments; before its first step, those of eight batches at the start."""

        def moments():
            if self.trainer.steps:
                return self.trainer.moments()
            batches = [batch_of(rows[4 * i : 4 * i + 4]) for i in range(8)]
            return second_moments(self.scoring, batches, "all-linear")

        return moments

    def start(self, rows: list[Row], rule: Rule, warmup: int, costs: Costs) -> None:
        """Plain warm-up steps, run once for all rules of a task that share them. The oracle has none of its own."""
        key = (rule.with_validation, warmup, rule.choose == "oracle")
        if key not in self.starts:
            self.trainer.reset()
            shared = Costs()
            size = self.study.training.rows_per_step
            for step in range(warmup):
                part = rows[step * size : (step + 1) * size]
                weights = None
                if rule.choose == "oracle":
                    weights = [torch.from_numpy((~row.response_noise).astype(np.float32)) for row in part]
                with Clock() as clock:
                    self.trainer.step(part, weights)
                shared.add("train", clock.cpu, clock.wall)
            self.starts[key] = (self.trainer.state(), shared)
        state, shared = self.starts[key]
        self.trainer.restore(state)
        costs.add("train", shared.cpu["train"], shared.wall["train"])

    def _weigh(self, rule: Rule, scorer: Scorer, rows: list[Row], costs: Costs, first: bool) -> dict[int, np.ndarray]:
        """Weights by row id. The first values after a shared start are shared too, with their cost."""
        key = (
            rule.signal, rule.is_calibrated, rule.value_width is None, rule.with_validation, rule.warmup, len(rows),
            rule.known_rows,
        )  # fmt: skip
        if first and key in self.first_values:
            values, held_out, clock = self.first_values[key]
        else:
            with Clock() as clock:
                values, held_out = _measure(rule, scorer, rows)
            if first:
                self.first_values[key] = (values, held_out, clock)
        costs.add("score", clock.cpu, clock.wall)
        return self.weights_by_row(rule, scorer, rows, values, held_out)

    def _weigh_averaged(self, rule: Rule, scorer: Scorer, rows: list[Row], costs: Costs) -> dict[int, np.ndarray]:
        """Weights by row id, from values that are means over checkpoints of plain training, whose cost is scoring's."""
        size = self.study.training.rows_per_step
        found = []
        self.trainer.reset()
        with Clock() as clock:
            for step in range(max(rule.checkpoints) + 1):
                if step in rule.checkpoints:
                    found.append(scorer.values(rule.signal, rows))
                if step < max(rule.checkpoints):
                    self.trainer.step(rows[step * size : (step + 1) * size])
        costs.add("score", clock.cpu, clock.wall)
        values = replace(found[0], value=np.mean([part.value for part in found], axis=0))
        return self.weights_by_row(rule, scorer, rows, values, None)

    def weights_by_row(
        self, rule: Rule, scorer: Scorer, rows: list[Row], values: Values, held_out: Values | None
    ) -> dict[int, np.ndarray]:
        """What the rule makes of values and what is known of the validation rows."""
        window = Window(
            values,
            self.classes(rows),
            held_out,
            None if held_out is None else self.classes(held_out_order(scorer.validation)),
            TOKEN_CLASS_NAMES,
        )
        weights = weights_of(rule, window)
        parts = np.split(weights, values.offsets[1:-1])
        return {row.row_id: part for row, part in zip(rows, parts, strict=True)}

    def classes(self, rows: list[Row]) -> np.ndarray:
        return np.concatenate([self.class_of[row.response_ids] for row in rows])


def _measure(rule: Rule, scorer: Scorer, rows: list[Row]) -> tuple[Values, Values | None]:
    """(values of rows, of the validation rows where the rule needs them; only losses unless it compares values)."""
    if rule.value_width is not None:
        return scorer.calibrated(rule.signal, rows, FOLDS)
    values = scorer.values(rule.signal, rows)
    held_out = scorer.values(Signal("loss"), held_out_order(scorer.validation)) if rule.is_calibrated else None
    return values, held_out


class Record:
    """Which tokens were dropped, of which kind of row and class, and how many of them were noise."""

    def __init__(self) -> None:
        self.dropped: list[np.ndarray] = []
        self.noise: list[np.ndarray] = []
        self.kinds: list[np.ndarray] = []
        self.classes: list[np.ndarray] = []

    def add(self, rows: list[Row], weights: dict[int, np.ndarray], class_of: np.ndarray) -> None:
        for row in rows:
            noise = row.response_noise
            weight = weights.get(row.row_id, np.ones(len(noise)))
            self.dropped.append(1.0 - weight)
            self.noise.append(noise)
            self.kinds.append(np.full(len(noise), row.kind if row.row_id >= 0 else "validation"))
            self.classes.append(class_of[row.response_ids])

    def summary(self) -> dict:
        if not self.dropped:
            return {}
        dropped, noise = np.concatenate(self.dropped), np.concatenate(self.noise)
        kinds, classes = np.concatenate(self.kinds), np.concatenate(self.classes)
        precision, recall = stats.precision_recall(dropped > 0.5, noise)
        return {
            "dropped": float(dropped.mean()),
            "noise": float(noise.mean()),
            "precision": precision,
            "recall": recall,
            "dropped_by_kind": {str(kind): float(dropped[kinds == kind].mean()) for kind in np.unique(kinds)},
            "dropped_by_class": {
                name: float(dropped[classes == i].mean())
                for i, name in enumerate(TOKEN_CLASS_NAMES)
                if (classes == i).any()
            },
        }
