"""The paper's procedure as it is described, for comparison: validation examples in the batch, every attention matrix,
a full backward pass, and the (token x validation token) products. Same values as the contraction, much more work.

B responses, E validation examples, T positions, N and V their response tokens.
"""

import torch
from torch.nn import functional as F

from alphatoken.architecture import scored_linears, value_rows
from alphatoken.batching import Batch
from alphatoken.capture import capturing

VALIDATION_CHUNK = 1024  # columns of the (N x V) products held at once
MICRO_BATCH = 8  # sequences per backward pass: the sum of losses does not depend on it, the memory does


def paper_values(model, batch: Batch, validation: Batch, parameters: str, window: int) -> torch.Tensor:
    """Adaptation (Eqs. 8 + 9) of the batch's response tokens: N. The model runs eager attention, all trainable."""
    linears = scored_linears(model, parameters)
    parts = [run_micro_batch(model, part, linears) for part in [*split(batch), *split(validation)]]
    ours, theirs = parts[: len(list(split(batch)))], parts[len(list(split(batch))) :]
    validation_count = sum(len(part["where"][0]) for part in theirs)
    totals = []
    for part in ours:
        total = torch.zeros(len(part["where"][0]))
        for linear in linears:
            index = value_rows(linear, model)
            band = None if index is None else banded(part["attention"][linear.layer], window)
            h, delta = part["h"][linear.name], part["delta"][linear.name]
            for other in theirs:
                h_v, delta_v = (other[kind][linear.name][other["where"]] for kind in ("h", "delta"))
                for h_chunk, delta_chunk in zip(
                    h_v.split(VALIDATION_CHUNK), delta_v.split(VALIDATION_CHUNK), strict=True
                ):
                    inner = h[part["where"]] @ h_chunk.T  # N x V
                    total += ((delta[part["where"]] @ delta_chunk.T) * inner).sum(1)
                    if band is not None:
                        ahead = torch.matmul(band.transpose(1, 2), delta @ delta_chunk.T)  # B x T x V
                        total += (ahead[part["where"]] * inner).sum(1)
        totals.append(total / validation_count)
    return torch.cat(totals)


def split(batch: Batch):
    for start in range(0, len(batch.input_ids), MICRO_BATCH):
        rows = slice(start, start + MICRO_BATCH)
        yield Batch(batch.input_ids[rows], batch.response_mask[rows], batch.row_ids[rows])


def run_micro_batch(model, batch: Batch, linears) -> dict:
    """Forward with all attentions and full logits, backward to every weight; what the scored layers saw."""
    with torch.enable_grad(), capturing(linears) as (inputs, outputs):
        result = model(input_ids=batch.input_ids, output_attentions=True, use_cache=False)
        for output in outputs.values():
            output.retain_grad()
        logits = result.logits[:, :-1].flatten(0, 1).float()
        losses = F.cross_entropy(logits, batch.input_ids[:, 1:].flatten(), reduction="none")
        (losses * batch.response_mask[:, 1:].flatten()).sum().backward()
    scored = {linear.layer for linear in linears}
    return {
        "h": {name: h.float() for name, h in inputs.items()},
        "delta": {name: output.grad.float() for name, output in outputs.items()},
        "attention": {layer: result.attentions[layer].detach() for layer in scored},
        "where": batch.predicting,
    }


def banded(attention: torch.Tensor, window: int) -> torch.Tensor:
    """Head average of B H T T, zero outside 0 < k - p <= window."""
    length = attention.shape[-1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    return attention.float().mean(1) * ((distance > 0) & (distance <= window))
