"""The pure parts of benchmarks/evidence: noise injection, rules, intervals."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks.evidence import again, larger_report
from benchmarks.evidence.__main__ import SHORT_RULES
from benchmarks.evidence.data import Row, corrupt_digits, shuffled_words
from benchmarks.evidence.forgetting import Forgetting, cases
from benchmarks.evidence.grid import FRESH, FULL, LARGER_STEPS, ORACLE, SUSPECT, TYPICAL, runs, with_validation
from benchmarks.evidence.preference import PAIR_RULES
from benchmarks.evidence.report import fill, summary
from benchmarks.evidence.results import read_results
from benchmarks.evidence.rules import Rule, Window, typical_rows, weights_of
from benchmarks.evidence.runs import Record
from benchmarks.evidence.signals import Values
from benchmarks.evidence.stats import auroc, gap_closed, mean_interval, paired, precision_recall, ranks

DIGITS = np.arange(100, 110)
SUSPECT_TOKENS = replace(SUSPECT, loss_width=None)


def values(value, loss, lengths) -> Values:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Values(np.asarray(value, float), np.asarray(loss, float), offsets)


def window(value, lengths, loss=None, classes=None, **more) -> Window:
    loss = np.ones(len(value)) if loss is None else loss
    classes = np.zeros(len(value), int) if classes is None else np.asarray(classes)
    return Window(values(value, loss, lengths), classes, **more)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_exactly_the_changed_digits_are_noise(share: float) -> None:
    ids = [101, 5, 6, 102, 103, 7, 104, 105, 106, 8]
    row = Row(0, ids, [False] * 3 + [True] * 7, [False] * 10)
    noisy = corrupt_digits(row, DIGITS, share, np.random.default_rng(0), "numbers")
    changed = np.array(noisy.input_ids) != np.array(ids)
    assert changed.tolist() == noisy.noise
    assert changed.sum() == round(share * 5)
    assert not changed[:3].any()  # the prompt's digits stay
    assert np.isin(np.array(noisy.input_ids)[changed], DIGITS).all()
    assert noisy.response_noise.tolist() == changed[3:].tolist()


def test_shuffled_words_are_the_same_words() -> None:
    text = "one two three four five six"
    shuffled = shuffled_words(text, np.random.default_rng(1))
    assert shuffled != text and sorted(shuffled.split()) == sorted(text.split())


def test_tokens_rule_drops_the_lowest_of_the_window_and_keeps_one_of_each_row() -> None:
    rule = replace(FRESH, keep=0.5)
    assert weights_of(rule, window([5, 4, 3, 2, -2, -1], [4, 2])).tolist() == [1, 1, 1, 0, 0, 1]
    sequence = replace(rule, scope="sequence")
    assert weights_of(sequence, window([5, 4, 3, 2, -2, -1], [4, 2])).tolist() == [1, 1, 0, 0, 0, 1]


def test_class_scope_drops_the_same_share_of_each_class() -> None:
    rule = replace(FRESH, keep=0.5, scope="class")
    weights = weights_of(rule, window([1, 2, 3, 4, 10, 20, 30, 40], [8], classes=[0] * 4 + [1] * 4))
    assert weights.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_protected_classes_stay() -> None:
    rule = replace(FRESH, keep=0.5, protect=("digits",))
    names = ("words", "digits")
    weights = weights_of(rule, window([1, 2, 3, -9], [4], classes=[0, 0, 0, 1], class_names=names))
    assert weights.tolist() == [0, 1, 1, 1]


def test_below_zero_drops_only_that() -> None:
    rule = replace(FRESH, keep=1.0, min_value=0.0)
    weights = weights_of(rule, window([1, -1, 2, -3], [2, 2]))
    assert weights.tolist() == [1, 0, 1, 0]


def test_typical_rows_are_those_that_validation_rows_look_like() -> None:
    held_out = values([1, 1, 2, 2, 3, 3], [1, 1, 1.5, 1.5, 2, 2], [2, 2, 2])  # means 1, 2, 3; losses 1, 1.5, 2
    rows = values([2, 2, -9, -9, 2, 2], [1, 1, 1, 1, 9, 9], [2, 2, 2])
    assert typical_rows(TYPICAL, rows, held_out).tolist() == [True, False, False]
    assert typical_rows(replace(TYPICAL, loss_width=None), rows, held_out).tolist() == [True, False, True]
    assert typical_rows(replace(TYPICAL, value_width=None), rows, held_out).tolist() == [True, True, False]


def test_suspects_are_surprising_and_harmful() -> None:
    known = values(np.ones(100), np.linspace(0, 1, 100), [50, 50])
    more = {"held_out": known, "held_out_classes": np.zeros(100, int)}
    seen = window([-1, 1, -1, -1], [4], loss=np.array([5.0, 5.0, 0.5, 5.0]), classes=[0, 0, 0, 7], **more)
    assert weights_of(SUSPECT_TOKENS, seen).tolist() == [0, 1, 1, 1]  # class 7 has too few validation tokens to judge
    assert weights_of(replace(SUSPECT_TOKENS, suspect_value=None), seen).tolist() == [0, 0, 1, 1]


def test_rows_rule_mixes_ranks() -> None:
    rule = Rule("rows", "rows", keep=0.5, loss_share=0.5)
    assert weights_of(rule, window([1, 2, 3, 4], [1, 1, 1, 1], loss=np.array([9.0, 1.0, 9.0, 1.0]))).tolist() == [
        0,
        1,
        0,
        1,
    ]


def test_rows_go_first_and_then_tokens_of_the_rest() -> None:
    rule = Rule("rows, then tokens", "rows", keep=0.75, token_keep=0.5)
    weights = weights_of(rule, window([-9, 9, 1, 8, 7, 2, 6, 3], [2, 2, 2, 2]))  # row means 0, 4.5, 4.5, 4.5
    assert weights.tolist() == [0, 0, 0, 1, 1, 0, 1, 0]


def test_record_counts_dropped_noise() -> None:
    record = Record()
    row = Row(3, [1, 2, 3, 4], [False, True, True, True], [False, False, True, True], "numbers")
    record.add([row], {3: np.array([1.0, 0.0, 1.0])}, np.zeros(10, np.int8))
    summary = record.summary()
    assert summary["precision"] == 1.0 and summary["recall"] == 0.5
    assert summary["dropped_by_kind"] == {"numbers": pytest.approx(1 / 3)}


def test_interval_is_students() -> None:
    mean, width = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([1.0])[1])


def test_differences_are_paired_by_seed() -> None:
    assert paired({0: 1.0, 1: 3.0, 2: 9.0}, {1: 1.0, 0: 2.0}) == [-1.0, 2.0]


def test_ranks_and_auroc() -> None:
    assert ranks(np.array([3.0, 1.0, 1.0])).tolist() == [1.0, 0.25, 0.25]
    assert auroc(np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1])) == 1.0
    assert auroc(np.array([1, 1, 1, 1]), np.array([0, 1, 0, 1])) == 0.5
    assert math.isnan(auroc(np.array([1, 2]), np.array([1, 1])))


def test_precision_recall_and_gap() -> None:
    assert precision_recall(np.array([True, True, False]), np.array([True, False, True])) == (0.5, 0.5)
    assert gap_closed(1.1, 1.2, 1.0) == pytest.approx(0.5)
    assert math.isnan(gap_closed(1.1, 1.0, 1.0))


def test_grid_has_no_run_twice() -> None:
    for full in (False, True):
        keys = [json.dumps(asdict(run), sort_keys=True) for run in runs(full)]
        assert len(set(keys)) == len(keys)
        named = [(run.set, run.seed, run.rule.name) for run in runs(full)]
        assert len(set(named)) == len(named), "two rules share a name"


def test_the_short_version_is_part_of_the_full_one() -> None:
    assert set(runs(False)) <= set(runs(True))
    assert set(SHORT_RULES["forgetting"]) <= {case.rule.name for case in cases(Forgetting())}
    assert set(SHORT_RULES["preference"]) <= {rule.name for rule in PAIR_RULES}


def test_full_sft_is_compared_at_equal_steps(tmp_path) -> None:
    for rule, losses in ((replace(FULL, steps=72), {"48": 1.2, "72": 1.1}), (ORACLE, {"48": 1.0})):
        run = {"run": {"set": "mixed", "seed": 0, "rule": asdict(rule)}, "target_loss": losses}
        (tmp_path / f"{rule.name}.json").write_text(json.dumps(run))
    results = read_results(tmp_path)
    assert results.losses("mixed", "full") == {0: 1.2}
    assert results.losses("mixed", "full", 72) == {0: 1.1}
    assert with_validation(FULL).steps == 54


def test_full_sft_at_equal_compute_is_the_first_that_costs_as_much(tmp_path) -> None:
    steps = {str(step): 1.0 - step / 1000 for step in LARGER_STEPS}
    for name, rule_steps, losses, cpu in (
        (larger_report.FULL, max(LARGER_STEPS), steps, {"train": 120.0, "score": 0.0}),  # 2 s a step
        (larger_report.IN_RUN, 48, {"48": 0.9}, {"train": 100.0, "score": 5.0}),
    ):
        run = {"run": {"set": "mixed", "seed": 0, "rule": {"name": name, "steps": rule_steps}}, "target_loss": losses}
        (tmp_path / f"{rule_steps}.json").write_text(json.dumps(run | {"cpu_seconds": cpu}))
    full = json.loads((tmp_path / "60.json").read_text())
    assert [larger_report.equal_steps(full, seconds) for seconds in (1, 105, 108, 109, 121)] == [48, 54, 54, 57, 0]
    last = larger_report.larger(read_results(tmp_path)).splitlines()[-1]
    assert last.split(" | ")[2:] == ["0.946", "108", "-0.0460", "1 of 1 |"]


def test_summary_is_paired_and_filled_into_the_text(tmp_path) -> None:
    losses = {"full": [1.2, 1.4], "oracle": [1.0, 1.2], "rule": [1.1, 1.3]}
    for rule, by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            run = {
                "run": {"set": "tokens", "seed": seed, "rule": {"name": rule, "steps": 48}},
                "target_loss": {"48": loss},
                "cpu_seconds": {"train": 10.0, "score": 5.0},
            }
            (tmp_path / f"{rule}{seed}.json").write_text(json.dumps(run))
    found = summary(read_results(tmp_path))
    assert "| rule | -0.1000 ± 0.0000 (50%) | 10 + 5 |" in found
    text = fill("a\n<!-- table: summary -->\nold\n<!-- end -->\nb\n", {"summary": found})
    assert "old" not in text and found in text and text.endswith("<!-- end -->\nb\n")


def test_two_results_of_the_same_runs_are_compared_by_rule(tmp_path) -> None:
    for folder, extra in (("first", 0.0), ("again", 0.01)):
        for rule, seed, loss in (("full", 0, 1.0), ("full", 1, 2.0), ("rule", 0, 0.9 + extra), ("rule", 1, 1.9)):
            run = {"run": {"set": "mixed", "seed": seed, "rule": {"name": rule}}, "target_loss": {"48": loss}}
            _write(tmp_path / folder / "trained" / f"{rule}{seed}.json", run)
        pairs = {"run": {"name": "full", "seed": 0}, "held_out": {"24": {"dpo_loss": 9}, "48": {"dpo_loss": 0.5}}}
        _write(tmp_path / folder / "preference" / "full.json", pairs)
    only_first = {"run": {"set": "mixed", "seed": 2, "rule": {"name": "rule"}}, "target_loss": {"48": 5.0}}
    _write(tmp_path / "first" / "trained" / "2.json", only_first)
    assert again.again(tmp_path / "first") == ""
    again.compare(tmp_path / "first", tmp_path / "again")
    lines = again.again(tmp_path / "first").splitlines()
    assert lines[0] == "5 runs in 3 minutes, 2 cores (a CPU)."
    assert lines[4:] == [
        "| mixed | full | 2 | 1.500 | 1.500 | 0e+00 |  |  |",
        "| mixed | rule | 2 | 1.400 | 1.405 | 1e-02 | -0.1000 ± 0.0000 | -0.0950 ± 0.0635 |",
        "| preference | full | 1 | 0.500 | 0.500 | 0e+00 |  |  |",
    ]


def _write(path, run: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run | {"run_seconds": 36.0, "machine": {"cpu": "a CPU", "cores": 2}}))
