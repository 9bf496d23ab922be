"""The diagonal Fisher of the reference model (Eq. 5).

    F = E over prompts x and responses y sampled from the model itself, of sum over response tokens of delta^2 (h^2)^T

delta is the gradient of the summed (never mean) loss. A property of the reference checkpoint: computed once, cached.
"""

from collections.abc import Iterable

import torch

from alphatoken.architecture import scored_linears
from alphatoken.batching import Batch, make_batch
from alphatoken.capture import capture
from alphatoken.contraction import squared_outer_sum
from alphatoken.direction import MeanGradient, Tensors, add_into
from alphatoken.errors import UserError
from alphatoken.model import ScoringModel


def diagonal_fisher(scoring: ScoringModel, batches: Iterable[Batch], parameters: str) -> MeanGradient:
    """Mean over rows of sum over response tokens of delta^2 (h^2)^T. Rows are prompts with sampled responses.

    Raises:
        UserError: `parameters` has more than linear weights, or there is no row.
    """
    if parameters == "all":
        raise UserError(
            "the Fisher (Eq. 5) is defined for linear weights: use --parameters last-layers:K or all-linear"
        )
    linears = scored_linears(scoring.model, parameters)
    total: Tensors = {}
    num_rows, num_tokens = 0, 0
    for batch in batches:
        captured = capture(scoring, batch, linears)
        where = batch.predicting
        for linear in linears:
            squares = squared_outer_sum(captured.deltas[linear.name][where], captured.inputs[linear.name][where])
            add_into(total, {linear.name: linear.to_native(squares)})
        num_rows += batch.input_ids.shape[0]
        num_tokens += batch.num_response_tokens
    if not num_rows:
        raise UserError("no prompt was left to sample from, so there is no Fisher; check --prompts")
    return MeanGradient({name: tensor / num_rows for name, tensor in total.items()}, num_rows, num_tokens)


@torch.no_grad()
def sample_responses(
    scoring: ScoringModel,
    prompts: list[list[int]],
    row_ids: list[int],
    *,
    max_new_tokens: int,
    end_ids: set[int],
    seed: int,
) -> Batch:
    """One sampled response per prompt (temperature 1, no truncation of the distribution), as a scoring batch."""
    width = max(len(prompt) for prompt in prompts)
    device = scoring.device
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):  # generation needs prompts to end together: padding on the left
        ids[b, width - len(prompt) :] = torch.tensor(prompt)
        mask[b, width - len(prompt) :] = 1
    torch.manual_seed(seed)
    generated = scoring.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids),
        pad_token_id=min(end_ids),
    )[:, width:].tolist()
    rows = [prompt + until_end(answer, end_ids) for prompt, answer in zip(prompts, generated, strict=True)]
    masks = [[i >= len(prompt) for i in range(len(row))] for prompt, row in zip(prompts, rows, strict=True)]
    return make_batch(rows, masks, row_ids)


def until_end(answer: list[int], end_ids: set[int]) -> list[int]:
    """Tokens up to and including the first end-of-turn token."""
    for index, token in enumerate(answer):
        if token in end_ids:
            return answer[: index + 1]
    return answer
