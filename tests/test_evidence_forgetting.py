"""benchmarks/evidence: forgetting, on a tiny model, and its tables."""

import numpy as np
import pytest
import torch
from evidence_lab import tiny_study, write_data

from alphatoken.direction import GradientOptions, adam_scale, batch_gradient
from benchmarks.evidence import data, forgetting_report
from benchmarks.evidence.data import Row, batch_of
from benchmarks.evidence.forgetting import Forgetting, ForgettingLab, Trace, cases, mean_kept, with_stability
from benchmarks.evidence.grid import EXACT
from benchmarks.evidence.signals import Scorer, Values
from benchmarks.evidence.stats import bootstrap_interval, first_crossing, rank_correlation


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TRAINING_ROWS", 12)
        settings = Forgetting(
            tiny_study(tiny_checkpoint, 1e-2), steps=6, warmup=2, refresh=2, fisher_prompts=2, opening=8,
            sampled_tokens=6,
        )  # fmt: skip
        yield ForgettingLab(write_data(tmp_path_factory.mktemp("data")), settings)


def test_runs_of_a_seed_share_their_start_and_stability_changes_what_is_dropped(lab) -> None:
    found = {case.rule.name: lab.run(0, case) for case in cases(lab.settings) if case.stability in (None, 0.0, 50.0)}
    full, random = found["full"], found["random 20%"]
    plain, heavy = (found[f"exact, worst 20%, lambda {weight}"] for weight in ("0", "50"))
    assert all(run["curve"][:2] == full["curve"][:2] for run in found.values())
    assert [point["step"] for point in full["curve"]] == [0, 2, 4, 6]
    assert full["curve"][-1]["target_loss"] < full["curve"][0]["target_loss"]
    assert full["detection"]["dropped"] == 0 and 0.1 < random["detection"]["dropped"] < 0.3
    assert 0.1 < plain["detection"]["dropped"] < 0.3
    assert plain["curve"][-1] != heavy["curve"][-1]
    assert "values" in plain["windows"][0] and "values" not in random["windows"][0]
    for window, before, after in zip(full["windows"], full["curve"][1:-1], full["curve"][2:], strict=True):
        assert window["measured"] == after["text_loss"] - before["text_loss"]
        assert window["penalty"] > window["drift"]  # its second order is positive


def test_drift_is_the_gradient_of_the_penalty(lab) -> None:
    trainer = lab.lab.trainer
    trainer.reset()
    assert Trace(trainer, lab.fisher).foretold() == {"drift": 0.0, "penalty": 0.0, "distance": 0.0}
    name, importance = next(iter(lab.fisher.items()))
    with torch.no_grad():
        trainer.parameters[name].add_(0.1)
        trace = Trace(trainer, lab.fisher)
        trainer.parameters[name].add_(0.01)
    found, total = trace.foretold(), float(importance.sum())
    assert total > 0
    assert found["drift"] == pytest.approx(0.1 * 0.01 * total, rel=1e-3)
    assert found["penalty"] == pytest.approx(0.5 * (0.11**2 - 0.1**2) * total, rel=1e-3)
    assert found["distance"] == pytest.approx(0.5 * (0.11**2 - 0.1**2) * importance.numel(), rel=1e-3)
    trainer.reset()


def test_stability_of_a_steps_tokens_is_what_the_preconditioned_step_moves_along_the_drift(lab) -> None:
    trainer, scoring = lab.lab.trainer, lab.lab.scoring
    task = lab.lab.load_task("clean", 0)
    part, rate = task.train[:3], 1e-3
    trainer.reset()
    trainer.step(task.train[3:6])
    trace = Trace(trainer, lab.fisher)
    scorer = Scorer(scoring, task.validation, trainer.moments, lab.lab.end_of_turn, 0, trace.drift)
    values = scorer.values(EXACT, part)
    by_row = dict(zip((row.row_id for row in part), np.split(values.stability, values.offsets[1:-1]), strict=True))
    everything = {row.row_id: np.ones(len(by_row[row.row_id])) for row in part}
    expected = -rate * mean_kept(part, everything, by_row)
    gradient, count = batch_gradient(scoring, batch_of(part), GradientOptions("all-linear"))
    scale = adam_scale(trainer.moments())
    with torch.no_grad():
        for name in lab.fisher:
            trainer.parameters[name].sub_(rate * scale[name] * gradient[name] / count)
    assert expected != 0
    assert trace.foretold()["drift"] == pytest.approx(expected, rel=0.02)
    trainer.reset()


def test_mean_of_what_a_step_keeps() -> None:
    part = [Row(3, [1, 2, 3], [False, True, True], [False] * 3), Row(5, [1, 2], [False, True], [False] * 2)]
    weights = {3: np.array([1.0, 0.0]), 5: np.array([1.0])}
    values = {3: np.array([2.0, 100.0]), 5: np.array([4.0])}
    assert mean_kept(part, weights, values) == 3.0
    both = Values(np.array([1.0, 2.0]), np.zeros(2), np.array([0, 2]), np.array([10.0, -10.0]))
    assert with_stability(both, 0.5).value.tolist() == [6.0, -3.0]


def test_general_text_is_compared_at_equal_target_loss() -> None:
    assert first_crossing([2.0, 1.0, 0.5], [3.0, 3.4, 4.0], 1.5) == pytest.approx(3.2)
    assert first_crossing([2.0, 1.0], [3.0, 3.4], 2.5) == 3.0
    assert np.isnan(first_crossing([2.0, 1.0], [3.0, 3.4], 0.5))
    runs = {"full": {0: run_of([2, 1, 0.5], [3, 3.4, 4])}, "rule": {0: run_of([2, 1.5, 1], [3, 3, 3.1])}}
    runs["rule"][0] |= {"run": {"stability": 3.0}, "windows": [{"stability_spread": 1.0, "adaptation_spread": 2.0}]}
    level = forgetting_report.at_equal_target(runs)  # the rule ends at 1
    assert level == {"full": {0: pytest.approx(3.4)}, "rule": {0: pytest.approx(3.1)}}
    assert (
        "| rule | 1 | 1.000 | +0.5000 | +0.1000 | -0.9000 | -0.3000 | 20% | 1.500 | 2 + 1 |"
        in forgetting_report.rules(runs)
    )


def test_predictions_are_judged_over_windows_with_runs_drawn_anew() -> None:
    assert rank_correlation(np.array([[1, 10], [2, 20], [3, 900]])) == pytest.approx(1.0)
    assert np.isnan(rank_correlation(np.ones((4, 2))))
    parts = [np.array([[i, i + 0.1 * (i % 2)] for i in range(start, start + 4)]) for start in range(0, 16, 4)]
    low, high = bootstrap_interval(parts, rank_correlation)
    assert 0.9 < low <= high <= 1.0
    # Later windows have more of both, but within equal starts the prediction is the wrong way round.
    runs = {
        "full": {0: run_of([2, 1], [3, 4], [(0, 1, 2), (4, 11, 12)])},
        "rule": {0: run_of([2, 1], [3, 4], [(0, 2, 1), (4, 12, 11)])},
    }
    points = np.concatenate([np.column_stack(group) for group in forgetting_report.windows(runs, "drift")])
    assert rank_correlation(points[:, 1:]) > 0.5
    assert rank_correlation(forgetting_report.without_time(points)) == pytest.approx(-1.0)
    assert "| 4 | 2 | 0.60 (" in forgetting_report.foretold(runs)


def run_of(target: list[float], text: list[float], windows: list[tuple] = ()) -> dict:
    names = ("start", "drift", "measured")
    return {
        "curve": [{"target_loss": a, "text_loss": b} for a, b in zip(target, text, strict=True)],
        "windows": [dict(zip(names, window, strict=True)) for window in windows],
        "detection": {"dropped": 0.2},
        "cpu_seconds": {"train": 2.0, "score": 1.0},
    }
