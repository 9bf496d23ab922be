"""In-run trainers, one step in this process: masks from offline values, gradients from the hand-written losses."""

import copy

import datasets
import numpy as np
import pytest
import torch

pytest.importorskip("trl")
from trl import DPOConfig, SFTConfig

from alphatoken.batching import Batch, make_batch
from alphatoken.direction import GradientOptions, adam_scale, drift, mean_gradient
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.losses import dpo_omega
from alphatoken.model import prepare_model
from alphatoken.value_propagation import ValuePropagation
from pipelines.in_run import InRunDPOTrainer, InRunSFTTrainer
from pipelines.in_run_refresh import InRunPlan, Refreshing
from pipelines.moments import moment_states
from pipelines.train_data import DPOCollator, SFTCollator
from tests import hand_written
from tests.masked_folder import SIDES, pair_rows, sft_rows
from tests.test_suspects import slow_bounds
from tests.test_trainers import BETA, PAD, TOKENIZER, options, small_model, step

KEEP = 0.6


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def validation() -> list[Batch]:
    rows = sft_rows(3, seed=9)
    return [make_batch([row["input_ids"] for row in rows], [row["response_mask"] for row in rows])]


def plan_of(estimator: str, **changes) -> InRunPlan:
    positions = "response" if estimator == "value_propagation" else "all"
    parameters = "last-layers:1" if estimator == "value_propagation" else "all-linear"
    settings = {"keep_fraction": KEEP, "refresh_every": 1, "plain_steps": 0, "validation": validation()}
    return InRunPlan(estimator, options=GradientOptions(parameters, positions=positions), **(settings | changes))


def offline_values(model, estimator: str, ids: list[list[int]], masks: list[list[bool]]) -> list[torch.Tensor]:
    """Values of each row, one tensor a row, at the weights of `model`."""
    plan, scoring = plan_of(estimator), prepare_model(copy.deepcopy(model))
    direction = mean_gradient(scoring, plan.validation, plan.options).tensors
    kind = ValuePropagation if estimator == "value_propagation" else Exact
    batch = make_batch(ids, masks)
    return batch.split(kind(scoring, plan.options.parameters, direction)(batch).adaptation)


def above_quantile(values: list[torch.Tensor]) -> list[list[bool]]:
    """Whether each token is among the best KEEP of all, or the best of its row."""
    everything = torch.cat(values).sort(descending=True).values
    threshold = everything[-(-int(KEEP * 10) * len(everything) // 10) - 1]
    return [[bool(v >= min(threshold, row.max())) for v in row] for row in values]


def sft_trainer(folder, model, rows, plan, normalize="kept", **changes):
    return InRunSFTTrainer(
        model,
        args=SFTConfig(**options(folder, dataset_kwargs={"skip_prepare_dataset": True}, **changes)),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
        data_collator=SFTCollator(PAD, use_masks=False, use_weights=False),
        normalize=normalize,
        plan=plan,
    )


@pytest.mark.parametrize("normalize", ["kept", "response"])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("estimator", ["value_propagation", "exact"])
def test_sft_step(tmp_path, estimator, batch, accumulation, normalize):
    """Accumulation changes neither the masks nor the gradient."""
    model = small_model()
    rows = [{name: row[name] for name in ("input_ids", "response_mask")} for row in sft_rows(8)]
    values = offline_values(model, estimator, *([row[name] for row in rows] for name in rows[0]))
    masked = []
    for row, keep in zip(rows, map(iter, above_quantile(values)), strict=True):
        labels = [t if inside and next(keep) else -100 for t, inside in zip(*row.values(), strict=True)]
        masked.append(row | {"labels": labels})
    dropped = sum(label == -100 for row in masked for label in row["labels"])
    assert dropped > sum(not inside for row in rows for inside in row["response_mask"])
    expected = hand_written.gradient(copy.deepcopy(model), lambda m: hand_written.sft(m, masked, normalize))
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = sft_trainer(tmp_path, model, rows, plan_of(estimator), normalize, **sizes)
    hand_written.assert_same_gradient(step(trainer), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        hand_written.sft(small_model(), masked, normalize).item(), rel=1e-6
    )


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("rule", ["suspect", "surprising"])
def test_sft_step_within_bounds(tmp_path, monkeypatch, rule, batch, accumulation):
    """Bounds from losses one row and one token at a time; whole rows go too."""
    monkeypatch.setattr("alphatoken.suspects.FEWEST_TOKENS", 3)
    monkeypatch.setattr("alphatoken.suspects.QUANTILES", (0.5, 0.9))
    monkeypatch.setattr("alphatoken.suspects.LEAST_EXCESS", -1.0)  # random models: nothing is in excess of anything
    monkeypatch.setattr("alphatoken.suspects.ROW_WIDTH", 0.2)
    model = small_model()
    rows = [{name: row[name] for name in ("input_ids", "response_mask")} for row in sft_rows(8)]
    held_out = sft_rows(3, seed=9)
    classes = torch.arange(model.config.vocab_size) % 2

    def losses_of(row: dict) -> list[tuple[int, float]]:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        inside = [i for i, mask in enumerate(row["response_mask"]) if mask]
        return [(row["input_ids"][i], -float(logprobs[i - 1, row["input_ids"][i]])) for i in inside]

    known = [losses_of(row) for row in held_out]
    by_class = [[(token % 2, loss) for row in part for token, loss in row] for part in (known, map(losses_of, rows))]
    limits = slow_bounds(*by_class, 2)
    assert np.isfinite(limits).any()
    means = [np.mean([loss for _, loss in row]) for row in known]
    row_limit = np.mean(means) + 0.2 * np.std(means, ddof=1)
    values = offline_values(model, "exact", *([row[name] for row in rows] for name in rows[0]))
    masked, dropped_rows, dropped_tokens = [], 0, 0
    for row, row_values in zip(rows, values, strict=True):
        found = losses_of(row)
        whole = np.mean([loss for _, loss in found]) > row_limit
        flags = [
            not whole and not (loss > limits[token % 2] and (rule == "surprising" or value < 0))
            for (token, loss), value in zip(found, row_values.tolist(), strict=True)
        ]
        dropped_rows += whole
        dropped_tokens += 0 if whole else len(flags) - sum(flags)
        keep = iter(flags)
        labels = [t if inside and next(keep) else -100 for t, inside in zip(*row.values(), strict=True)]
        masked.append(row | {"labels": labels})
    assert dropped_rows and dropped_tokens  # the case is not empty
    expected = hand_written.gradient(copy.deepcopy(model), lambda m: hand_written.sft(m, masked, "kept"))
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    plan = plan_of("exact", rule=rule, class_of=classes.to(torch.int8))
    trainer = sft_trainer(tmp_path, model, rows, plan, **sizes)
    hand_written.assert_same_gradient(step(trainer), expected)


@pytest.mark.parametrize("mode", ["loss", "ratio"])
@pytest.mark.parametrize(("batch", "accumulation", "stored"), [(6, 1, False), (2, 3, False), (6, 1, True)])
@pytest.mark.parametrize("estimator", ["value_propagation", "exact"])
def test_dpo_step(tmp_path, estimator, batch, accumulation, stored, mode):
    """stored: the reference's log-probabilities come with the rows, one for each token."""
    model, reference = small_model(), small_model(seed=1)
    rows = pair_rows(6)
    for side in SIDES:  # values with DPO's sign and weight, and a threshold of its own
        ids = [row["prompt_ids"] + row[f"{side}_ids"] for row in rows]
        inside = [[False] * len(row["prompt_ids"]) + [True] * len(row[f"{side}_ids"]) for row in rows]
        values = offline_values(model, estimator, ids, inside)
        signed = []
        for row, row_values in zip(rows, values, strict=True):
            with torch.no_grad():
                ours, theirs = hand_written.pair_sums(model, row), hand_written.pair_sums(reference, row)
            ratios = [ours[name][0] - theirs[name][0] for name in SIDES]
            omega = dpo_omega(ratios[0], ratios[1], BETA)
            signed.append(row_values * (omega if side == "chosen" else -omega))
        for row, keep in zip(rows, above_quantile(signed), strict=True):
            row[f"new_{side}_mask"] = keep
    masked = [row | {f"{side}_mask": row[f"new_{side}_mask"] for side in SIDES} for row in rows]
    expected = hand_written.dpo_gradient(copy.deepcopy(model), reference, masked, BETA, mode)
    given = [{name: row[name] for name in row if not name.startswith("new_")} for row in rows]
    if stored:
        given = [row | hand_written.reference_columns(reference, row) for row in given]
    trainer = InRunDPOTrainer(
        model,
        ref_model=None if stored else reference,
        args=DPOConfig(
            **options(
                tmp_path, beta=BETA, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                precompute_ref_log_probs=stored,
            )
        ),
        train_dataset=datasets.Dataset.from_list(given),
        eval_dataset=datasets.Dataset.from_list(given),
        processing_class=TOKENIZER,
        data_collator=DPOCollator(PAD, None, stored, mode, use_masks=False),
        dpo_mask=mode,
        plan=plan_of(estimator),
    )
    hand_written.assert_same_gradient(step(trainer), expected)
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(hand_written.dpo_loss(small_model(), reference, masked, BETA, mode), rel=1e-5)
    assert {"rewards/margins", "kept_fraction"} <= first.keys()


def test_the_direction_is_refreshed_every_k_steps_after_the_plain_ones(tmp_path):
    rows = sft_rows(20)
    plan = plan_of("exact", plain_steps=2, refresh_every=3)
    trainer = sft_trainer(
        tmp_path, small_model(), rows, plan, per_device_train_batch_size=2, max_steps=9, learning_rate=1e-3
    )
    trainer.train()
    kept = [line["kept_fraction"] for line in trainer.state.log_history if "kept_fraction" in line]
    assert kept[:2] == [1.0, 1.0] and max(kept[2:]) < 0.9
    assert trainer.refreshes == 3  # before steps 2, 5 and 8


def test_a_run_that_went_on_refreshes_when_the_whole_run_does(tmp_path, monkeypatch):
    """And at once, for it has no direction yet."""
    plan = plan_of("exact", plain_steps=2, refresh_every=3)
    options = {"per_device_train_batch_size": 2, "max_steps": 9, "learning_rate": 1e-3, "save_strategy": "steps"}
    rows, refreshed = sft_rows(20), []
    refresh = Refreshing._refresh
    monkeypatch.setattr(Refreshing, "_refresh", lambda self: (refreshed.append(self.state.global_step), refresh(self)))
    sft_trainer(tmp_path, small_model(), rows, plan, save_steps=4, **options).train()
    assert refreshed == [2, 5, 8]
    trainer = sft_trainer(tmp_path, small_model(), rows, plan, save_steps=4, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert refreshed[3:] == [4, 5, 8]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_of_plain_steps_only_says_so(tmp_path, caplog, steps):
    plan = plan_of("exact", plain_steps=2)
    trainer = sft_trainer(tmp_path, small_model(), sft_rows(8), plan, per_device_train_batch_size=2, max_steps=steps)
    trainer.train()
    assert ("all 2 steps train on every token" in caplog.text) == (steps == 2)


def test_adam_preconditioner_is_the_optimizer_s_own(tmp_path):
    """And a first step without moments trains on everything."""
    rows = sft_rows(8)
    plan = plan_of("exact", preconditioner="adam")
    trainer = sft_trainer(
        tmp_path, small_model(), rows, plan, per_device_train_batch_size=4, max_steps=2, optim="adamw_torch",
        learning_rate=1e-3,
    )  # fmt: skip
    seen = record_directions(trainer, lambda: weights_of(trainer))
    trainer.train()
    assert [line["kept_fraction"] for line in trainer.state.log_history if "kept_fraction" in line][0] == 1.0
    (direction, (scoring, moments)), = seen
    expected = mean_gradient(scoring, plan.validation, plan.options).tensors
    scale = adam_scale(moments)
    for name, tensor in direction.items():
        torch.testing.assert_close(tensor, expected[name] * scale[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_optimizer_without_second_moments_is_refused(momentum):
    """Nothing could be valued: every token would be trained on, however long the run."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum)
    assert moment_states(model, optimizer, "last-layers:1") is None
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    if momentum:
        with pytest.raises(UserError, match="this one keeps momentum_buffer: give --optimizer adamw_torch_fused or"):
            moment_states(model, optimizer, "last-layers:1")


def record_directions(trainer, beside) -> list[tuple]:
    """Every direction that is set, with what `beside` says at that moment."""
    seen, plain = [], trainer.in_run.set_direction

    def record(tensors):
        seen.append((tensors, beside()))
        plain(tensors)

    trainer.in_run.set_direction = record
    return seen


def weights_of(trainer):
    """(a copy of the model, the optimizer's second moments without bias)."""
    named = dict(trainer.model.named_parameters())
    state = {name: trainer.optimizer.state[named[name]] for name in trainer._direction}
    beta = trainer.args.adam_beta2
    moments = {name: found["exp_avg_sq"].float() / (1 - beta ** float(found["step"])) for name, found in state.items()}
    return prepare_model(copy.deepcopy(trainer.model)), moments


def test_drift_is_that_of_the_current_weights(tmp_path):
    rows, reference = sft_rows(8), small_model()
    names = [name for name, p in reference.named_parameters() if "proj" in name]
    fisher = {name: torch.rand_like(dict(reference.named_parameters())[name]) for name in names}
    weights = {name: dict(reference.named_parameters())[name].detach().clone() for name in names}
    plan = plan_of("exact", fisher=fisher, reference_weights=weights, stability_weight=2.0, refresh_every=10)
    trainer = sft_trainer(tmp_path, small_model(), rows, plan, per_device_train_batch_size=4, max_steps=2)
    seen = record_directions(trainer, lambda: drift(dict(trainer.model.named_parameters()), weights, fisher))
    trainer.train()
    assert len(seen) == 2 and trainer.refreshes == 1
    (first, none_yet), (second, moved) = seen
    assert all(not tensor.any() for tensor in none_yet.values()) and any(tensor.any() for tensor in moved.values())
    for name in names:
        torch.testing.assert_close(second[name] - first[name], 2.0 * moved[name], rtol=1e-4, atol=1e-9)
