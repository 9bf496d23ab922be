"""The trainers in this process, one worker; several workers are in test_train_pipeline.py."""

import copy
from dataclasses import dataclass

import datasets
import pytest
import torch

pytest.importorskip("trl")
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.train_config import TrainConfig
from pipelines.train_checks import _why_sums_are_no_use
from pipelines.train_data import FILLER, EpochBatches, data_shards
from pipelines.train_worker import _evaluation_rows
from pipelines.trainers import DPOCollator, MaskedDPOTrainer, MaskedSFTTrainer, SFTCollator
from tests import hand_written
from tests.masked_folder import pair_rows, sft_rows, write_masked
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
PAD = 0
BETA = 0.3


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64):
    return tiny_model(
        "llama", seed, dtype, vocab_size=len(TOKENIZER), num_hidden_layers=2,
        eos_token_id=TOKENIZER.eos_token_id,
    )  # fmt: skip


def options(folder, **changes) -> dict:
    """One SGD step of rate 1 without clipping: it moves the weights by minus the gradient."""
    plain = {
        "output_dir": str(folder), "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "gradient_checkpointing": False, "max_length": None, "disable_tqdm": True, "logging_steps": 1,
        "prediction_loss_only": True,
    }  # fmt: skip
    return plain | changes


def sft_trainer(folder, model, rows, collator=None, normalize="kept", trainer=MaskedSFTTrainer, **changes):
    special = {"normalize": normalize} if trainer is MaskedSFTTrainer else {}
    return trainer(
        model,
        args=SFTConfig(**options(folder, dataset_kwargs={"skip_prepare_dataset": True}, **changes)),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
        data_collator=collator or SFTCollator(PAD),
        **special,
    )


def dpo_trainer(folder, model, rows, ref_model=None, mode="loss", collator=None, evaluation=None, **changes):
    stored = "ref_chosen_logps" in rows[0]
    return MaskedDPOTrainer(
        model,
        ref_model=ref_model,
        args=DPOConfig(**options(folder, beta=BETA, precompute_ref_log_probs=stored, **changes)),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=evaluation or datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
        data_collator=collator or DPOCollator(PAD, None, stored, mode),
        dpo_mask=mode,
    )


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def step(trainer) -> list[torch.Tensor]:
    """The gradient that one step used."""
    before = weights(trainer.model)
    trainer.train()
    return [old - new for old, new in zip(before, weights(trainer.model), strict=True)]


@pytest.mark.parametrize("normalize", ["kept", "response"])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_sft_step_has_the_gradient_of_the_masked_loss(tmp_path, normalize, batch, accumulation):
    rows, model = sft_rows(8), small_model()
    expected = hand_written.gradient(copy.deepcopy(model), lambda m: hand_written.sft(m, rows, normalize))
    value = hand_written.sft(model, rows, normalize).item()
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = sft_trainer(tmp_path, model, rows, normalize=normalize, **sizes)
    hand_written.assert_same_gradient(step(trainer), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value, rel=1e-6)


def test_kept_and_response_normalisation_differ_by_the_kept_share(tmp_path):
    rows = sft_rows(4)
    kept = sum(label != -100 for row in rows for label in row["labels"])
    response = sum(sum(row["response_mask"]) for row in rows)
    steps = [
        step(sft_trainer(tmp_path, small_model(), rows, normalize=name, per_device_train_batch_size=4))
        for name in ("kept", "response")
    ]
    assert kept < response
    hand_written.assert_same_gradient([part * kept / response for part in steps[0]], steps[1])


def test_sft_weights(tmp_path):
    rows, model = sft_rows(6), small_model()
    generator = torch.Generator().manual_seed(1)
    for row in rows:  # dropped tokens of the response have a weight below 1
        soft = torch.rand(len(row["labels"]), generator=generator) * torch.tensor(row["response_mask"])
        row["weights"] = [1.0 if label != -100 else float(w) for label, w in zip(row["labels"], soft, strict=True)]
    expected = hand_written.gradient(copy.deepcopy(model), lambda m: hand_written.sft(m, rows))
    found = step(sft_trainer(tmp_path, model, rows, per_device_train_batch_size=2, gradient_accumulation_steps=3))
    hand_written.assert_same_gradient(found, expected)
    hard = [{name: value for name, value in row.items() if name != "weights"} for row in rows]
    expected = hand_written.gradient(small_model(), lambda m: hand_written.sft(m, hard))
    collator = SFTCollator(PAD, use_weights=False)
    found = step(sft_trainer(tmp_path, small_model(), rows, collator, per_device_train_batch_size=6))
    hand_written.assert_same_gradient(found, expected)


def test_nothing_masked_is_plain_trl_sft(tmp_path):
    rows = sft_rows(10, keep=1.1)
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": -1, "num_train_epochs": 1}
    adam |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    ours = sft_trainer(tmp_path, small_model(dtype=torch.float32), rows, **adam)
    order = [index for batch in EpochBatches(len(rows), 2, seed=ours.args.seed) for index in batch]
    bare = [{name: rows[index][name] for name in ("input_ids", "labels")} for index in order]
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    plain = sft_trainer(
        tmp_path, small_model(dtype=torch.float32), bare, DataCollatorForLanguageModeling(PAD), trainer=SFTTrainer,
        train_sampling_strategy="sequential", **adam,
    )  # fmt: skip
    ours.train()
    plain.train()
    found, expected = (
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, plain)
    )
    assert len(found) == 3 and found == pytest.approx(expected, rel=1e-6)
    for a, b in zip(weights(ours.model), weights(plain.model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_an_empty_batch_is_skipped_and_counted(tmp_path):
    rows = sft_rows(5)
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])
    adam = {"optim": "adamw_torch", "weight_decay": 0.5, "learning_rate": 1e-2, "max_steps": -1, "num_train_epochs": 1}
    trainer = sft_trainer(tmp_path, small_model(), rows, per_device_train_batch_size=1, **adam)
    trace = []

    def record(optimizer, *_):
        trace.append(weights(trainer.model))

    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(record)
    trace.append(weights(trainer.model))
    trainer.train()
    order = [batch[0] for batch in EpochBatches(5, 1, seed=trainer.args.seed)]
    moved = [
        any((a != b).any() for a, b in zip(before, after, strict=True))
        for before, after in zip(trace, trace[1:], strict=False)
    ]
    assert moved == [index != 2 for index in order]
    logged = [entry for entry in trainer.state.log_history if "skipped_batches" in entry]
    assert ["loss" in entry for entry in logged] == moved
    assert logged[-1]["skipped_batches"] == 1 and trainer.state.global_step == 5


def test_a_mean_over_logged_steps_leaves_skipped_ones_out(tmp_path):
    rows = sft_rows(2)
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    trainer = sft_trainer(
        tmp_path, small_model(), rows, per_device_train_batch_size=1, max_steps=2, logging_steps=2, learning_rate=1e-9
    )
    value = hand_written.sft(trainer.model, rows[:1]).item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value, rel=1e-5)


def test_held_out_loss_is_a_mean_over_all_response_tokens(tmp_path):
    rows, model = sft_rows(5), small_model()
    everything = [
        row | {"labels": [i if m else -100 for i, m in zip(row["input_ids"], row["response_mask"], strict=True)]}
        for row in rows
    ]
    trainer = sft_trainer(tmp_path, model, rows, per_device_eval_batch_size=2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(hand_written.sft(model, everything).item(), rel=1e-6)


def test_long_rows_are_cut(tmp_path):
    rows, model = sft_rows(4, longest=24), small_model()
    names = ("input_ids", "labels", "response_mask")
    short = [row | {name: row[name][:8] for name in names} for row in rows]
    expected = hand_written.gradient(copy.deepcopy(model), lambda m: hand_written.sft(m, short))
    found = step(sft_trainer(tmp_path, model, rows, SFTCollator(PAD, max_length=8), per_device_train_batch_size=4))
    hand_written.assert_same_gradient(found, expected)


@pytest.mark.parametrize("mode", ["loss", "ratio"])
@pytest.mark.parametrize("reference", ["model", "stored", "scored"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_dpo_step_has_the_hand_written_gradient(tmp_path, mode, reference, batch, accumulation):
    rows, model, ref_model = pair_rows(4), small_model(0), small_model(1)
    expected = hand_written.dpo_gradient(copy.deepcopy(model), ref_model, rows, BETA, mode)
    value = hand_written.dpo_loss(model, ref_model, rows, BETA, mode)
    if reference == "stored":
        rows, ref_model = with_reference(rows, ref_model, per_token=mode == "ratio"), None
    elif reference == "scored":
        rows, ref_model = as_scored(rows, ref_model), None
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = dpo_trainer(tmp_path, model, rows, ref_model, mode, **sizes)
    hand_written.assert_same_gradient(step(trainer), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("mode", ["loss", "ratio"])
def test_held_out_pairs_are_measured_against_what_is_left_of_their_reference(tmp_path, mode):
    """With log-probabilities by token where they are stored, cut as the response is."""
    rows = as_scored(pair_rows(5, keep=1.0), small_model(1))
    longest = 1 + max(len(row["prompt_ids"]) for row in rows)
    config = TrainConfig(
        objective="dpo", data=["d"], model="m", output="o", max_length=longest, dpo_mask=mode, evaluation=["e"]
    )
    folder = write_masked(tmp_path / "held-out", rows, "m")
    found = _evaluation_rows(config, {"evaluation_shards": data_shards(folder), "stored_reference": True})
    collator = DPOCollator(PAD, longest, True, mode)
    trainer = dpo_trainer(tmp_path, small_model(), rows, None, mode, collator=collator, evaluation=found)
    cut = [
        row | {f"{side}_{name}": row[f"{side}_{name}"][: longest - len(row["prompt_ids"])]
               for side in ("chosen", "rejected") for name in ("ids", "mask")}
        for row in rows
    ]  # fmt: skip
    expected = hand_written.dpo_loss(small_model(), small_model(1), cut, BETA, "loss")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    summed = [{name: value for name, value in row.items() if not name.endswith("ref_logprobs")} for row in rows]
    sums = storage.list_shards(write_masked(tmp_path / "sums", summed, "m"))
    assert _why_sums_are_no_use(config, sums[0]).startswith("--dpo-mask" if mode == "ratio" else "--max-length")
    assert _why_sums_are_no_use(config, data_shards(folder)[0]) is None


def test_the_load_of_experts_is_no_part_of_a_held_out_loss(tmp_path):
    rows, losses = pair_rows(4), []
    for coefficient in (0.0, 0.5):
        model = tiny_model("qwen3_moe", vocab_size=len(TOKENIZER), router_aux_loss_coef=coefficient)
        trainer = dpo_trainer(tmp_path, model, rows, small_model(1, torch.float32), "loss")
        assert trainer.aux_loss_enabled == bool(coefficient)
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.aux_loss_enabled == bool(coefficient)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def with_reference(rows: list[dict], model, per_token: bool) -> list[dict]:
    found = []
    for row in rows:
        extra = {}
        for side in ("chosen", "rejected"):
            prompt = row["prompt_ids"]
            with torch.no_grad():
                tokens = hand_written.logprobs(model, prompt + row[f"{side}_ids"])[len(prompt) :]
            extra[f"ref_{side}_logps"] = tokens.tolist() if per_token else tokens.sum().item()
        found.append(row | extra)
    return found


def as_scored(rows: list[dict], model) -> list[dict]:
    """Sums, and beside them one number per token: the columns of `score`."""
    summed, tokens = (with_reference(rows, model, per_token=per_token) for per_token in (False, True))
    return [
        a | {f"{side}_ref_logprobs": b[f"ref_{side}_logps"] for side in ("chosen", "rejected")}
        for a, b in zip(summed, tokens, strict=True)
    ]


@pytest.mark.parametrize("mode", ["loss", "ratio"])
def test_the_stored_reference_covers_what_is_left_of_a_cut_pair(mode):
    rows = as_scored(pair_rows(4), small_model(1))
    longest = 1 + max(len(row["prompt_ids"]) for row in rows)
    batch = DPOCollator(PAD, longest, True, mode)(rows)
    for side in ("chosen", "rejected"):
        for row, found in zip(rows, batch[f"ref_{side}_logps"].tolist(), strict=True):
            left = longest - len(row["prompt_ids"])
            kept = [True] * left if mode == "loss" else row[f"{side}_mask"]
            pairs = zip(row[f"{side}_ref_logprobs"][:left], kept, strict=False)
            assert found == pytest.approx(sum(value for value, keep in pairs if keep))
        assert any(len(row[f"{side}_ids"]) > longest - len(row["prompt_ids"]) for row in rows)  # some were cut


def test_nothing_masked_is_plain_trl_dpo(tmp_path):
    texts = [("What is", " two plus two?", " five"), ("Hello", " there, how are you", " today?")] * 3
    pairs = [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts]
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": -1, "num_train_epochs": 1, "beta": BETA}
    adam |= {"per_device_train_batch_size": 2, "max_grad_norm": 1.0}
    order = [index for batch in EpochBatches(len(pairs), 2, seed=42) for index in batch]
    plain = DPOTrainer(
        small_model(dtype=torch.float32),
        ref_model=small_model(1, torch.float32),
        args=DPOConfig(**options(tmp_path, train_sampling_strategy="sequential", **adam)),
        train_dataset=datasets.Dataset.from_list([pairs[index] for index in order]),
        processing_class=TOKENIZER,
    )
    tokenised = sorted(zip(order, plain.train_dataset.to_list(), strict=True), key=lambda item: item[0])
    rows = [
        {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        | {f"{side}_mask": [True] * len(row[f"{side}_ids"]) for side in ("chosen", "rejected")}
        for _, row in tokenised
    ]
    adam.pop("beta")
    ours = dpo_trainer(tmp_path, small_model(dtype=torch.float32), rows, small_model(1, torch.float32), **adam)
    ours.train()
    plain.train()
    for name in ("loss", "rewards/margins"):
        found, expected = (
            [entry[name] for entry in trainer.state.log_history if name in entry] for trainer in (ours, plain)
        )
        assert len(found) == 3 and found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for a, b in zip(weights(ours.model), weights(plain.model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_lost_masks_are_noticed_before_the_first_step(tmp_path):
    @dataclass(frozen=True)
    class DropsLabels(SFTCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            return batch | {"labels": batch["input_ids"]}

    trainer = sft_trainer(tmp_path, small_model(), sft_rows(4), DropsLabels(PAD))
    before = weights(trainer.model)
    with pytest.raises(UserError, match="would be trained on where the data keeps"):
        trainer.train()
    assert all((a == b).all() for a, b in zip(before, weights(trainer.model), strict=True))

    @dataclass(frozen=True)
    class DropsMasks(DPOCollator):
        def __call__(self, rows):
            return super().__call__(rows) | {"kept_mask": super().__call__(rows)["completion_mask"].bool()}

    with pytest.raises(UserError, match="would be trained on where the data keeps"):
        dpo_trainer(tmp_path, small_model(), pair_rows(4), small_model(1), collator=DropsMasks(PAD)).train()
    assert sft_trainer(tmp_path, small_model(), sft_rows(4)).check_masks() is None


@pytest.mark.parametrize(("rows", "batch", "world"), [(13, 2, 2), (16, 4, 2), (3, 2, 4), (1, 1, 3), (7, 3, 1)])
def test_an_epoch_has_each_row_once(rows, batch, world):
    workers = [EpochBatches(rows, batch, rank, world, seed=5) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        for worker in workers:
            worker.set_epoch(epoch)
        found = [list(worker) for worker in workers]
        assert {len(batches) for batches in found} == {len(workers[0])}
        assert all(len({len(batch) for batch in step}) == 1 for step in zip(*found, strict=True))
        seen = [index for batches in found for part in batches for index in part if index != FILLER]
        assert sorted(seen) == list(range(rows))
        epochs.append(seen)
    if rows > 4:
        assert epochs[0] != epochs[1]


def test_fillers_add_nothing(tmp_path):
    rows = sft_rows(3)
    batch = SFTCollator(PAD)([row | {"filler": index == 1} for index, row in enumerate(rows)])
    assert (batch["labels"][1] == -100).all() and batch["response_tokens"][1] == 0
    pairs = with_reference(pair_rows(3), small_model(1), per_token=False)
    batch = DPOCollator(PAD, reference=True)([row | {"filler": index == 1} for index, row in enumerate(pairs)])
    assert batch["real_pairs"].tolist() == [True, False, True]
    assert not batch["kept_mask"][[1, 4]].any() and not batch["completion_mask"][[1, 4]].any()
    assert batch["ref_chosen_logps"][1] == 0
