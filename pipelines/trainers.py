"""TRL's SFTTrainer and DPOTrainer on token-masked rows.

What they add: batches from pipelines/train_data.py, one normaliser for all micro-batches and workers of an optimizer
step, steps with nothing kept that leave the model alone and are counted, a check that the masks reach the batch, and
held-out losses by token (SFT) or pair (DPO) over whole responses. The maths is in alphatoken/losses.py.

B rows (DPO: pairs), T positions.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets
import torch
from accelerate.utils import is_peft_model
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import DPOTrainer, SFTTrainer

from alphatoken import losses
from alphatoken.errors import UserError
from alphatoken.losses import DPOMask
from alphatoken.schema import IGNORE_INDEX
from pipelines.exact_head import use_exact_head
from pipelines.train_data import WEIGHTS, Batch, DPOCollator, EpochBatches, EpochLoader, RowsWithFillers, SFTCollator


class SkipEmptySteps(TrainerCallback, ExportableState):
    """Drops all gradients before an optimizer step in which no token is kept, and counts such steps.

    Optimizers pass over parameters without a gradient: no momentum, no weight decay moves them. The schedule and the
    step count go on, so the order of the data does not depend on it.
    """

    def __init__(self) -> None:
        self.nothing_kept = False
        self.skipped = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if self.nothing_kept:
            self.skipped += 1
            model.zero_grad(set_to_none=True)

    def state(self) -> dict:
        return {"args": {}, "attributes": {"skipped": self.skipped}}


class _MaskedTrainer(Trainer):
    """What both objectives share; goes before TRL's class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None:
                use_exact_head(model.get_base_model() if is_peft_model(model) else model)
        self.add_callback(SkipEmptySteps())
        self._logged_step = self._logged_skipped = 0
        self._held_out = torch.zeros(2, dtype=torch.float64)  # sum of losses, count

    # Which rows, in which order

    def get_train_dataloader(self) -> EpochLoader:
        return self._loader(self.train_dataset, self.args.per_device_train_batch_size, self.data_collator, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: datasets.Dataset | None = None) -> EpochLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        collator = replace(self.data_collator, use_masks=False)
        return self._loader(rows, self.args.per_device_eval_batch_size, collator, shuffle=False)

    def _loader(self, rows: datasets.Dataset, batch_size: int, collator: Callable, shuffle: bool) -> EpochLoader:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        batches = EpochBatches(len(rows), batch_size, args.process_index, args.world_size, seed, shuffle)
        return EpochLoader(
            self._rows(rows),
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def _rows(self, rows: datasets.Dataset) -> RowsWithFillers:
        return RowsWithFillers(rows)

    # One normaliser per optimizer step

    def _counts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight of kept tokens, what the loss is divided by) of one micro-batch."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """The normaliser of one optimizer step, over all its micro-batches and all workers."""
        counts = [torch.stack([count.double() for count in self._counts(batch)]) for batch in batch_samples]
        local = torch.stack(counts).sum(0) if counts else torch.zeros(2, dtype=torch.float64)
        kept, normaliser = self.accelerator.reduce(local.to(device), "sum")
        self._empty_steps.nothing_kept = not kept.item()
        return normaliser

    def _scaled(self, total: torch.Tensor, normaliser: torch.Tensor) -> torch.Tensor:
        """What one micro-batch adds to a step's loss. Gradients are averaged over workers, hence the factor."""
        divisor = torch.where(normaliser > 0, normaliser, 1.0).to(total.dtype)
        return total / divisor * self.accelerator.num_processes

    @property
    def _empty_steps(self) -> SkipEmptySteps:
        # transformers makes a new callback when it resumes: look it up.
        return next(found for found in self.callback_handler.callbacks if isinstance(found, SkipEmptySteps))

    # What is told

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A mean over the steps that trained; no loss where none did."""
        if "loss" in logs:
            skipped = self._empty_steps.skipped
            steps, empty = self.state.global_step - self._logged_step, skipped - self._logged_skipped
            if steps > empty:
                logs["loss"] *= steps / (steps - empty)
            else:
                for name in ("loss", "grad_norm"):
                    logs.pop(name, None)
            logs["skipped_batches"] = skipped
            self._logged_step, self._logged_skipped = self.state.global_step, skipped
        super().log(logs, start_time)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args, **kwargs)
        self._logged_step, self._logged_skipped = self.state.global_step, self._empty_steps.skipped
        return found

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """With the loss as one mean over all tokens (pairs), not a mean over batches of means."""
        self._held_out = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self._held_out, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        return output

    def _held_out_loss(self, found: losses.LossSum) -> torch.Tensor:
        self._held_out += torch.stack([found.total.detach(), found.count]).double()
        return found.total / found.count.clamp(min=1)

    # Masks that got lost

    def check_masks(self) -> str | None:
        """What is wrong with the masks in the trainer's own first batch, or None. Leaves no trace in random states."""
        loader = self.get_train_dataloader()
        indices = next(iter(loader.batch_sampler))
        rows = [loader.dataset[index] for index in indices]
        return self._lost_masks(rows, loader.collate_fn(rows))

    def _lost_masks(self, rows: list[dict], batch: Batch) -> str | None:
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> Any:
        problem = self.check_masks()
        if problem:
            raise UserError(problem)
        return super().train(*args, **kwargs)


class MaskedSFTTrainer(_MaskedTrainer, SFTTrainer):
    """SFT on kept tokens (Eq. 13). `data_collator` is an SFTCollator.

    normalize: divide by the kept tokens of the step (with weights: by their sum), or by all its response tokens.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, normalize: str = "kept", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normalize = normalize

    def _counts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        kept = (batch[WEIGHTS] if WEIGHTS in batch else batch["labels"] != IGNORE_INDEX)[:, 1:].sum()
        return kept, kept if self.normalize == "kept" else batch["response_tokens"].sum()

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        weights, _ = inputs.pop(WEIGHTS, None), inputs.pop("response_tokens")
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**inputs, **options, use_cache=False, fused_lm_head=True)
        kept = outputs.label_mask  # (B, T - 1), as everything of these outputs: entry i predicts input_ids[i + 1]
        found = losses.sft_loss(outputs.log_probs, kept, None if weights is None else weights[:, 1:])
        if num_items_in_batch is None:
            loss = self._held_out_loss(found)
        else:
            loss = self._scaled(found.total, num_items_in_batch)
            if self.aux_loss_enabled:
                loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        self._add_metrics(outputs, kept, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _add_metrics(self, outputs: Any, kept: torch.Tensor, attention_mask: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        local = [kept.sum(), outputs.entropy.detach().sum(), outputs.is_top1.sum(), attention_mask.sum()]
        sums = self.accelerator.reduce(torch.stack([value.double() for value in local]), "sum").tolist()
        num_kept, entropy, correct, num_tokens = sums
        if num_kept:
            self._metrics[mode]["entropy"].append(entropy / num_kept)
            self._metrics[mode]["mean_token_accuracy"].append(correct / num_kept)
        if mode == "train":
            self._total_train_tokens += round(num_tokens)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _lost_masks(self, rows: list[dict], batch: Batch) -> str | None:
        collator = self.data_collator
        limit, soft = (
            getattr(collator, "max_length", None),
            WEIGHTS in rows[0] and getattr(collator, "use_weights", True),
        )
        expected = 0
        for row in rows:
            marks = [w > 0 for w in row[WEIGHTS]] if soft else [label != IGNORE_INDEX for label in row["labels"]]
            expected += 0 if row["filler"] else sum(marks[:limit])
        if "labels" not in batch:
            return "the trainer's batch has no labels: the token mask did not arrive; check the data collator"
        arrived = int((batch["labels"] != IGNORE_INDEX).sum())
        return None if arrived == expected else _lost(arrived, expected)


class MaskedDPOTrainer(_MaskedTrainer, DPOTrainer):
    """DPO on kept tokens (Eq. 14). Rows are tokenised already; `data_collator` is a DPOCollator.

    dpo_mask: `loss` (the paper: whole-response log-ratios, gradient through kept tokens) or `ratio` (log-ratios over
    kept tokens). The loss of a step is the mean over its pairs, on all workers. With
    `precompute_ref_log_probs=True` the rows bring the reference's log-probabilities.
    """

    loss_is_scaled_for_ga = True
    aux_loss_enabled: bool  # TRL's: whether experts' load is balanced

    def __init__(self, *args: Any, dpo_mask: DPOMask = "loss", **kwargs: Any) -> None:
        self.dpo_mask = dpo_mask
        super().__init__(*args, **kwargs)
        if self.args.precompute_ref_log_probs:
            self.ref_model = None  # under FSDP, TRL loads one for a pass that stored values make needless

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> datasets.Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> datasets.Dataset:
        return dataset

    def _counts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return batch["kept_mask"][:, 1:].sum(), batch["real_pairs"].sum()

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        if return_outputs:
            raise NotImplementedError("evaluate with prediction_loss_only=True")
        kept, real = inputs.pop("kept_mask"), inputs.pop("real_pairs")
        if self.dpo_mask == "ratio":
            inputs["completion_mask"] = kept.long()
        else:
            model = _DetachMasked(model, kept)
        balanced = self.aux_loss_enabled
        self.aux_loss_enabled = balanced and num_items_in_batch is not None  # no part of a held-out loss
        try:
            mean = super().compute_loss(model, inputs)
        finally:
            self.aux_loss_enabled = balanced
        # A filler pair has no response: its loss is -log sigmoid(0), without gradient.
        found = losses.LossSum(mean * len(real) - (~real).sum() * math.log(2), real.sum())
        if num_items_in_batch is None:
            return self._held_out_loss(found)
        return self._scaled(found.total, num_items_in_batch)

    def _lost_masks(self, rows: list[dict], batch: Batch) -> str | None:
        limit = getattr(self.data_collator, "max_length", None)
        expected = 0
        for row in rows:
            left = None if limit is None else max(limit - len(row["prompt_ids"]), 0)
            for side in ("chosen_mask", "rejected_mask"):
                expected += 0 if row["filler"] else sum(map(bool, row[side][:left]))
        if "kept_mask" not in batch:
            return "the trainer's batch has no kept_mask: the token mask did not arrive; check the data collator"
        arrived = int(batch["kept_mask"].sum())
        return None if arrived == expected else _lost(arrived, expected)


class _DetachMasked:
    """A model whose per-token log-probabilities keep their values, but only kept tokens their gradient."""

    def __init__(self, model: Any, kept_BT: torch.Tensor) -> None:
        self.model, self.kept = model, kept_BT

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        kept = self.kept[:, 1:]
        # A model with virtual prompt tokens returns more positions; the row's own are the last ones.
        outputs.log_probs = losses.detach_masked(outputs.log_probs[:, -kept.size(1) :], kept)
        return outputs


def _lost(arrived: int, expected: int) -> str:
    return (
        f"the token masks did not arrive in the trainer's batch: {arrived} tokens would be trained on where the data "
        f"keeps {expected}; check the data collator"
    )


__all__ = ["DPOCollator", "MaskedDPOTrainer", "MaskedSFTTrainer", "SFTCollator", "SkipEmptySteps"]
