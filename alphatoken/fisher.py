"""The diagonal Fisher of the reference model (Eq. 5).

    F = E over prompts x and responses y sampled from the model itself, of sum over response tokens of delta^2 (h^2)^T

delta is the gradient of the summed (never mean) loss. A property of the reference checkpoint: computed once, cached.
"""

from collections.abc import Iterable, Sequence

from alphatoken.architecture import scored_linears
from alphatoken.batching import Batch, make_batch
from alphatoken.capture import capture
from alphatoken.contraction import squared_outer_sum
from alphatoken.direction import GradientSum, MeanGradient, add_into
from alphatoken.errors import UserError
from alphatoken.model import ScoringModel


def diagonal_fisher(scoring: ScoringModel, batches: Iterable[Batch], parameters: str) -> MeanGradient:
    """Mean over rows of sum over response tokens of delta^2 (h^2)^T. Rows are prompts with sampled responses.

    Raises:
        UserError: `parameters` has more than linear weights, or there is no row.
    """
    return mean_of(fisher_sum(scoring, batches, parameters))


def mean_of(found: GradientSum) -> MeanGradient:
    """UserError where there is no row."""
    if not found.num_rows:
        raise UserError("no prompt was left to sample from, so there is no Fisher; check --prompts")
    mean = {name: tensor / found.num_rows for name, tensor in found.tensors.items()}
    return MeanGradient(mean, found.num_rows, found.num_tokens, found.weight)


def fisher_sum(
    scoring: ScoringModel, batches: Iterable[Batch], parameters: str, so_far: GradientSum | None = None
) -> GradientSum:
    """What `diagonal_fisher` is the mean of; may be empty. so_far: what is added to; its tensors are taken over."""
    if parameters in ("all", "lora"):
        raise UserError(
            "the Fisher (Eq. 5) is defined for linear weights: use --parameters last-layers:K or all-linear"
        )
    linears = scored_linears(scoring.model, parameters)
    so_far = so_far or GradientSum()
    total, num_rows, num_tokens = so_far.tensors, so_far.num_rows, so_far.num_tokens
    for batch in batches:
        captured = capture(scoring, batch, linears)
        where = batch.predicting
        for linear in linears:
            squares = squared_outer_sum(captured.deltas[linear.name][where], captured.inputs[linear.name][where])
            add_into(total, {linear.name: linear.to_native(squares)})
        num_rows += batch.input_ids.shape[0]
        num_tokens += batch.num_response_tokens
    return GradientSum(total, num_rows, num_tokens, float(num_rows))


def sampled_batch(samples: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """(prompt, sampled response) pairs as a scoring batch."""
    rows = [prompt + answer for prompt, answer in samples]
    masks = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in samples]
    return make_batch(rows, masks)
