"""The paper's Algorithm 1 as trainers: every batch is valued at the current weights, masked and trained on.

With one micro-batch per optimizer step, values come from the training forward pass itself. With several, the threshold
needs the values of all of them before the first can be trained on: they are valued first, in a pass of their own, so
that neither accumulation nor the number of workers changes a mask.

N response tokens of a micro-batch, B rows (DPO: 2B, chosen ones first), T positions.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import nn

from alphatoken import losses
from alphatoken.baselines import forward_losses
from alphatoken.batching import Batch
from alphatoken.head import LossHead
from alphatoken.in_run import InRun, ValuedForward
from alphatoken.model import ScoringModel
from alphatoken.schema import IGNORE_INDEX
from alphatoken.suspects import TokenLosses
from pipelines.in_run_masks import Judged, keep_all, keep_share, keep_unsuspected
from pipelines.in_run_refresh import InRunPlan, Refreshing
from pipelines.trainers import MaskedDPOTrainer, MaskedSFTTrainer

logger = logging.getLogger(__name__)

KEEP = "keep"  # N bool in a micro-batch whose mask was found before its forward pass

Inputs = dict[str, torch.Tensor]


class _InRunTrainer(Refreshing):
    """What both objectives share; goes before the masked trainer. Rows bring no masks."""

    def __init__(self, *args: Any, plan: InRunPlan, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if is_peft_model(self.model):
            raise ValueError("in-run values are those of whole weights")
        if self.aux_loss_enabled:
            logger.warning(
                "in-run training leaves out the loss that balances the load of experts (router_aux_loss_coef %g); "
                "rounds and training on a masked folder have it", self.router_aux_loss_coef,
            )  # fmt: skip
        self.plan = plan
        self.in_run = InRun(self.model, plan.estimator, plan.options.parameters, plan.window)
        _route_forward(self.model, self.in_run)

    # The masks

    def _get_num_items_in_batch(self, batch_samples: list[Inputs], device: torch.device) -> Any:
        """The normaliser of the step where masks are known before the forward pass; else None."""
        self._begin_step()
        if self.args.gradient_accumulation_steps == 1:
            return torch.tensor(float("nan"))  # found in compute_loss, with the values
        judged = []
        for sample in batch_samples:
            inputs = self._prepare_inputs(dict(sample))
            batch = self._batch(inputs)
            with self.accelerator.autocast():
                found = self.in_run.value(batch)
            judged.append(self._judged(found, batch, inputs))
        for sample, keep in zip(batch_samples, self._keep(judged), strict=True):
            sample[KEEP] = keep.cpu()
        return super()._get_num_items_in_batch(batch_samples, device)

    def _valued(self, model: nn.Module, inputs: Inputs) -> tuple[ValuedForward, Batch, torch.Tensor]:
        """(forward pass, batch, keep N) of a micro-batch."""
        batch = self._batch(inputs)
        known = inputs.pop(KEEP, None)
        found: ValuedForward = model(in_run_batch=batch, valued=known is None)
        if known is not None:
            return found, batch, known
        return found, batch, self._keep([self._judged(found, batch, inputs)])[0]

    def _judged(self, found: ValuedForward, batch: Batch, inputs: Inputs) -> Judged:
        branches = self._branches(batch)[batch.predicting[0]]
        return Judged(batch, found.losses.detach(), self._judge(found, batch, inputs), branches)

    def _keep(self, judged: list[Judged]) -> list[torch.Tensor]:
        """Masks of the micro-batches of a step (N bool each)."""
        if not self._ready:
            masks = keep_all(judged)
        elif self.plan.rule == "share":
            masks = keep_share(judged, self.plan.keep_fraction, self._everyones)
        else:
            assert self._known is not None and self.plan.class_of is not None
            masks = keep_unsuspected(judged, self._known, self.plan.class_of, self._everyones_losses)
        kept, total = (
            sum(float(part) for part in parts) for parts in ([m.sum() for m in masks], [m.numel() for m in masks])
        )
        self._metrics["train"]["kept_fraction"].append(kept / max(total, 1))
        return masks

    def _everyones(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all workers."""
        if self.accelerator.num_processes == 1:
            return values
        padded = self.accelerator.pad_across_processes(values[:, None], pad_index=torch.nan)[:, 0]
        gathered = self.accelerator.gather(padded)
        return gathered[~gathered.isnan()]

    def _everyones_losses(self, found: TokenLosses) -> TokenLosses:
        return TokenLosses.joined(gather_object([found]))

    def _batch(self, inputs: Inputs) -> Batch:
        raise NotImplementedError

    def _judge(self, found: ValuedForward, batch: Batch, inputs: Inputs) -> torch.Tensor | None:
        """What tokens are ranked by (N), or None where there is no direction yet."""
        return found.values

    def _branches(self, batch: Batch) -> torch.Tensor:
        """The group of each row that has a threshold of its own."""
        return torch.zeros(len(batch.input_ids), dtype=torch.long, device=batch.input_ids.device)

    def check_masks(self) -> None:
        """There are none to lose."""


class InRunSFTTrainer(_InRunTrainer, MaskedSFTTrainer):
    """SFT. The collator keeps every response token: `use_masks` is off."""

    def _batch(self, inputs: Inputs) -> Batch:
        return as_batch(inputs["input_ids"], inputs["labels"] != IGNORE_INDEX)

    def _counts(self, batch: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        kept = batch[KEEP].sum()
        return kept, kept if self.normalize == "kept" else batch["response_tokens"].sum()

    def compute_loss(
        self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        if num_items_in_batch is None:  # held-out rows
            return super().compute_loss(model, inputs, return_outputs)
        responses = inputs["response_tokens"].sum()
        found, _, keep = self._valued(model, inputs)
        if num_items_in_batch.isnan():
            kept = keep.sum() if self.normalize == "kept" else responses
            num_items_in_batch = self.accelerator.reduce(kept.double(), "sum")
            self._empty_steps.nothing_kept = not num_items_in_batch.item()
        self._metrics["train"]["num_tokens"] = [self._count_tokens(inputs)]
        # An empty sum still has to reach every worker's gradients.
        return self._scaled((found.losses * keep).sum(), num_items_in_batch)

    def _count_tokens(self, inputs: Inputs) -> float:
        self._total_train_tokens += int(self.accelerator.reduce(inputs["attention_mask"].sum(), "sum"))
        return self._total_train_tokens


class InRunDPOTrainer(_InRunTrainer, MaskedDPOTrainer):
    """DPO. A chosen token's value counts with omega, a rejected one's with -omega; each branch has its threshold."""

    def _batch(self, inputs: Inputs) -> Batch:
        return as_batch(inputs["input_ids"], inputs["completion_mask"] > 0)

    def _branches(self, batch: Batch) -> torch.Tensor:
        rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
        return (rows >= len(rows) // 2).long()

    def _counts(self, batch: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return batch[KEEP].sum(), batch["real_pairs"].sum()

    def _judge(self, found: ValuedForward, batch: Batch, inputs: Inputs) -> torch.Tensor | None:
        if found.values is None:
            return None
        logprobs = _by_position(-found.losses.detach(), batch)
        chosen, rejected = (logprobs.sum(1) - self._reference(batch, inputs).sum(1)).chunk(2)
        omega = losses.dpo_omega(chosen, rejected, self.beta)
        return found.values * torch.cat([omega, -omega])[batch.predicting[0]]

    def _reference(self, batch: Batch, inputs: Inputs) -> torch.Tensor:
        """(2B, T) log-probabilities of the reference model.

        The collator gives them by position where single ones are asked for. Else stored sums of whole responses stand
        at position 0, which no token's log-probability does: row sums are right.
        """
        if "reference" not in inputs:
            if self.ref_model is None:
                stored = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
                inputs["reference"] = nn.functional.pad(stored[:, None], (0, batch.input_ids.shape[1] - 1))
            else:
                reference = ScoringModel(self.ref_model, LossHead(self.ref_model))
                with self.accelerator.autocast():
                    inputs["reference"] = _by_position(-forward_losses(reference, batch).losses, batch)
        return inputs["reference"]

    def compute_loss(
        self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        if num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs)
        real = inputs["real_pairs"]
        if num_items_in_batch.isnan():
            num_items_in_batch = self.accelerator.reduce(real.sum().double(), "sum")
            self._empty_steps.nothing_kept = not num_items_in_batch.item()
        found, batch, keep = self._valued(model, inputs)
        logprobs = _by_position(-found.losses, batch).chunk(2)
        kept = _by_position(keep, batch).chunk(2)
        reference = self._reference(batch, inputs).chunk(2)
        sides: list[Any] = [*logprobs, *kept, *reference]
        loss = losses.dpo_loss(*sides, self.beta, self.dpo_mask)  # type: ignore[call-arg]
        # A filler pair has no response: its loss is -log sigmoid(0), without gradient.
        total = loss.total - (~real).sum() * torch.log(torch.tensor(2.0, dtype=loss.total.dtype))
        self._add_rewards([a.detach().sum(1) - b.sum(1) for a, b in zip(logprobs, reference, strict=True)], real)
        return self._scaled(total, num_items_in_batch)

    def _add_rewards(self, ratios: list[torch.Tensor], real: torch.Tensor) -> None:
        """TRL's names, over whole responses."""
        chosen, rejected = (self.beta * ratio[real] for ratio in ratios)
        parts = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        parts["accuracies"] = (chosen > rejected).double()
        for name, values in parts.items():
            if len(values):
                self._metrics["train"][f"rewards/{name}"].append(values.double().mean().item())


def as_batch(input_ids: torch.Tensor, response_mask: torch.Tensor) -> Batch:
    """A trainer's padded tensors as a batch to value."""
    mask = response_mask.clone()
    mask[:, 0] = False  # nothing predicts the first token
    return Batch(input_ids, mask, torch.arange(len(input_ids)))


def _by_position(per_token: torch.Tensor, batch: Batch) -> torch.Tensor:
    """N values to (B, T), zero outside the response."""
    rows, positions = batch.predicting
    zeros = torch.zeros(batch.input_ids.shape, dtype=per_token.dtype, device=per_token.device)
    return zeros.index_put((rows, positions + 1), per_token)


def _route_forward(model: nn.Module, in_run: InRun) -> None:
    """Let `model(in_run_batch=...)` value a batch, so that wrappers (DDP, autocast) see the pass."""
    plain: Callable = model.forward

    def forward(*args: Any, in_run_batch: Batch | None = None, valued: bool = True, **inputs: Any) -> Any:
        return plain(*args, **inputs) if in_run_batch is None else in_run.forward(in_run_batch, valued)

    model.forward = forward

