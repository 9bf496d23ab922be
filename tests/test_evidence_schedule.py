"""benchmarks/evidence: when values are taken."""

from dataclasses import replace

import numpy as np
import pytest
from evidence_lab import tiny_study, write_data

from benchmarks.evidence import data
from benchmarks.evidence.costs import Costs
from benchmarks.evidence.grid import FRESH
from benchmarks.evidence.rules import Window, weights_of
from benchmarks.evidence.runs import Lab
from benchmarks.evidence.signals import Scorer

MEAN = replace(FRESH, warmup=0, steps=6)


@pytest.fixture
def lab(tiny_checkpoint, tmp_path, monkeypatch) -> Lab:
    monkeypatch.setattr(data, "TRAINING_ROWS", 32)
    return Lab(write_data(tmp_path), tiny_study(tiny_checkpoint, 1e-2))


def test_the_mean_over_one_checkpoint_is_that_checkpoint(lab: Lab) -> None:
    rules = (replace(MEAN, checkpoints=(0,)), replace(MEAN, refresh=6))
    found = [lab.run("tokens", 0, rule, (6,), 6, False) for rule in rules]
    assert found[0]["detection"]["dropped"] > 0.1
    assert found[0]["detection"] == found[1]["detection"]
    assert found[0]["target_loss"] == found[1]["target_loss"]


def test_values_are_means_over_checkpoints_of_plain_training(lab: Lab) -> None:
    task = lab.load_task("tokens", 0)
    rule = replace(MEAN, checkpoints=(0, 2))
    rows = task.train[:12]
    scorer = Scorer(lab.scoring, task.validation, lab.moments(task.train), lab.end_of_turn, 0)
    found = lab._weigh_averaged(rule, scorer, rows, Costs())
    lab.trainer.reset()
    first = scorer.values(rule.signal, rows)
    for step in range(2):
        lab.trainer.step(rows[2 * step : 2 * step + 2])
    mean = (first.value + scorer.values(rule.signal, rows).value) / 2
    expected = weights_of(rule, Window(replace(first, value=mean), lab.classes(rows)))
    np.testing.assert_array_equal(np.concatenate([found[row.row_id] for row in rows]), expected)
