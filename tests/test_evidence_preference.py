"""benchmarks/evidence: DPO with flipped pairs, on a tiny model, and its table."""

import json

import numpy as np
import pytest
import torch
from evidence_lab import tiny_study, write_data
from torch.nn import functional as F

from alphatoken.pair_encode import EncodedPair
from benchmarks.evidence import preference_report
from benchmarks.evidence.__main__ import Work
from benchmarks.evidence.costs import Costs
from benchmarks.evidence.pairs import Pair, add_dpo_gradient, dpo_losses, make_pair_task, margins
from benchmarks.evidence.preference import (
    PAIR_RULES,
    PairValues,
    Preference,
    PreferenceLab,
    best_pairs,
    dropped_summary,
    everything,
    keep_pair_tokens,
)
from benchmarks.evidence.results import read_runs
from benchmarks.evidence.runs import Study
from benchmarks.evidence.stats import auroc

BETA = 0.5


@pytest.fixture(scope="module")
def settings(tiny_checkpoint) -> Preference:
    return Preference(
        tiny_study(tiny_checkpoint, 3e-3), pairs=18, validation_pairs=4, held_out=8, beta=BETA, steps=9, warmup=3,
        refresh=3, measure_at=(9,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def lab(folder, settings) -> PreferenceLab:
    return PreferenceLab(folder, settings)


def pair_of(row_id: int, chosen: int, rejected: int, flipped: bool = False) -> Pair:
    return Pair(row_id, EncodedPair([1], [2] * chosen, [3] * rejected, False), flipped)


def test_a_known_share_is_flipped_and_validation_pairs_are_clean() -> None:
    pairs = [pair_of(i, 1, 2) for i in range(30)]
    task = make_pair_task(pairs, 0, 21, 6, 1 / 3)
    assert sum(pair.flipped for pair in task.train) == 7
    assert all((pair.ids.chosen_ids == [3, 3]) == pair.flipped for pair in task.train)
    assert not any(pair.flipped for pair in task.validation)
    assert len({pair.row_id for pair in task.train + task.validation}) == 27
    with pytest.raises(ValueError, match="30 pairs are short enough; 31"):
        make_pair_task(pairs, 0, 25, 6, 1 / 3)


def naive_loss(lab, pairs, kept) -> torch.Tensor:
    """The paper's DPO (Eq. 14), a row at a time, from logits."""
    total = torch.zeros(())
    for pair, masks in zip(pairs, kept, strict=True):
        found = []
        for response, mask in zip((pair.ids.chosen_ids, pair.ids.rejected_ids), masks, strict=True):
            ids = torch.tensor([pair.ids.prompt_ids + response])
            parts = []
            for model in (lab.lab.scoring.model, lab.start.model):
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
                parts.append(logits.gather(-1, ids[0, 1:, None])[-len(response) :, 0])
            here, there = parts
            here = torch.where(torch.from_numpy(mask), here, here.detach())
            found.append((here - there).sum())
        total = total - F.logsigmoid(BETA * (found[0] - found[1]))
    return total / len(pairs)


def test_gradient_is_that_of_the_masked_dpo_loss(lab) -> None:
    trainer, scoring = lab.lab.trainer, lab.lab.scoring
    pairs = lab.load_task(0).train[:3]
    trainer.reset()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    kept = [tuple(rng.random(len(side)) < 0.6 for side in everything(pair)) for pair in pairs]
    flat = torch.from_numpy(np.concatenate([mask[side] for side in range(2) for mask in kept]))
    for parameter in trainer.parameters.values():
        parameter.requires_grad_(True)
    loss = add_dpo_gradient(scoring, pairs, flat, lab.reference, BETA)
    ours = {name: parameter.grad for name, parameter in trainer.parameters.items()}
    trainer.optimizer.zero_grad()
    expected = naive_loss(lab, pairs, kept)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert loss == pytest.approx(dpo_losses(margins(scoring, pairs, lab.reference, BETA)).mean(), rel=1e-4)
    for name, parameter in trainer.parameters.items():
        assert torch.allclose(ours[name], parameter.grad, atol=1e-5 * float(parameter.grad.abs().max()) + 1e-7), name
        parameter.requires_grad_(False)
    trainer.optimizer.zero_grad()
    trainer.reset()
    assert np.allclose(margins(scoring, pairs, lab.reference, BETA), 0, atol=1e-4)


def test_flipped_pairs_have_the_lowest_values(lab) -> None:
    task, trainer = lab.load_task(0), lab.lab.trainer
    trainer.reset()
    clean = [pair for pair in task.train if not pair.flipped]
    for start in range(0, 8, 2):
        lab._step(clean[start : start + 2], {}, Costs())
    found = lab.values(task.train)
    assert auroc(-found.mean, np.array([pair.flipped for pair in task.train])) > 0.9
    trainer.reset()


def test_every_rule_runs_and_is_found_again(folder, settings, tmp_path, monkeypatch) -> None:
    work = Work(Study(), folder, tmp_path)
    work.prefer([0], None, settings)
    found = {rule: of_rule[0] for rule, of_rule in read_runs(tmp_path / "preference").items()}
    assert set(found) == {rule.name for rule in PAIR_RULES}
    dropped = {name: run["detection"] for name, run in found.items()}
    assert dropped["full"]["dropped_pairs"] == 0 and 0 < dropped["full"]["flipped"] < 0.6
    assert dropped["oracle"]["pair_precision"] == dropped["oracle"]["pair_recall"] == 1.0
    assert dropped["random 33% of pairs"]["dropped_pairs"] == pytest.approx(1 / 3)  # after the warm-up
    assert dropped["values, worst 20% of tokens"]["dropped_pairs"] == 0
    assert 0.05 < dropped["values, worst 20% of tokens"]["dropped_tokens"] < 0.2
    assert found["oracle"]["held_out"]["9"]["dpo_loss"] < np.log(2)  # "please" against "now" is learned
    table = preference_report.rules(read_runs(tmp_path / "preference"))
    assert table.count("\n") == 2 + len(PAIR_RULES) and "| oracle | 1 |" in table
    monkeypatch.setattr(PreferenceLab, "run", lambda *_: pytest.fail("a finished run was run again"))
    work.prefer([0], None, settings)
    assert json.loads(next((tmp_path / "preference").glob("*.json")).read_text())["preference"]["beta"] == BETA


def test_tokens_have_a_threshold_for_each_branch() -> None:
    pairs = [pair_of(0, 2, 2), pair_of(1, 2, 2)]
    values = PairValues(
        [np.array([1.0, 2.0]), np.array([3.0, 4.0])], [np.array([-5.0, -6.0]), np.array([-7.0, -4.0])], np.zeros(2)
    )
    kept = keep_pair_tokens(pairs, values, 0.5)
    assert [side.tolist() for side in kept[0]] == [[False, True], [True, False]]
    assert [side.tolist() for side in kept[1]] == [[True, True], [False, True]]


def test_pairs_of_the_lowest_scores_go() -> None:
    pairs = [pair_of(10 + i, 1, 1, flipped=i == 2) for i in range(3)]
    kept = best_pairs(pairs, np.array([0.5, 2.0, -1.0]), 2 / 3)
    assert kept == {12: None}
    summary = dropped_summary([(pair, kept.get(pair.row_id, everything(pair))) for pair in pairs])
    assert summary["dropped_pairs"] == summary["dropped_tokens"] == pytest.approx(1 / 3)
    assert summary["pair_precision"] == summary["token_recall"] == 1.0
