"""Random preference pairs, and DPO's values from its loss by autograd in float64: slow, obvious, independent."""

import pyarrow as pa
import torch
from oracles import captures, gradient, positions, token_losses
from tiny_models import VOCABULARY
from torch.nn.functional import logsigmoid

from alphatoken import schema
from alphatoken.schema import BRANCHES


def random_pairs(seed: int, count: int, longest: int = 14) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int) -> list[int]:
        length = int(torch.randint(low, longest + 1, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [
        {"row_id": 10 + i, "id": f"p{i}", "prompt_ids": tokens(1), "chosen_ids": tokens(1), "rejected_ids": tokens(2)}
        for i in range(count)
    ]


def encoded_pairs(pairs: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([pair | {"truncated": False} for pair in pairs], schema=schema.ENCODED_PAIRS)


def branch_row(pair: dict, branch: str) -> tuple[list[int], list[bool]]:
    prompt, response = pair["prompt_ids"], pair[f"{branch}_ids"]
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def dpo_coefficients(policy, reference, pair: dict, beta: float) -> dict[str, torch.Tensor]:
    """d (DPO loss) / d (loss of every token), by autograd on the loss itself: by branch (n,)."""
    ours = {b: token_losses(policy, *branch_row(pair, b)).detach().requires_grad_() for b in BRANCHES}
    theirs = {b: token_losses(reference, *branch_row(pair, b)).detach() for b in BRANCHES}
    ratio = {b: -(ours[b].sum() - theirs[b].sum()) for b in BRANCHES}
    loss = -logsigmoid(beta * (ratio["chosen"] - ratio["rejected"]))
    return dict(zip(BRANCHES, torch.autograd.grad(loss, [ours[b] for b in BRANCHES]), strict=True))


def dpo_gradient(policy, reference, pairs: list[dict], beta: float, names: list[str]) -> dict[str, torch.Tensor]:
    """Gradient of the mean DPO loss by the parameters of `names`."""
    total = 0.0
    for pair in pairs:
        ours, theirs = (
            {b: token_losses(model, *branch_row(pair, b)).sum() for b in BRANCHES} for model in (policy, reference)
        )
        margin = (theirs["chosen"] - ours["chosen"]) - (theirs["rejected"] - ours["rejected"])
        total = total - logsigmoid(beta * margin) / len(pairs)
    return gradient(policy, total, names)


def propagated_values(policy, reference, pair, beta, tensors, linears, value_rows, window) -> dict[str, torch.Tensor]:
    """delta_p^T M h_p + sum_k A[k, p] delta_k^T M_v h_p per branch, delta from the DPO loss (Eqs. 8, 9, 14)."""
    coefficients = dpo_coefficients(policy, reference, pair, beta)
    found = {}
    for branch in BRANCHES:
        ids, mask = branch_row(pair, branch)
        h, delta, attention = captures(policy, ids, mask, list(tensors))
        weight = coefficients[branch][0]  # the same for all tokens of a branch
        assert torch.allclose(coefficients[branch], weight.expand_as(coefficients[branch]))
        values = []
        for p in positions(mask):
            value = 0.0
            for linear in linears:
                name, matrix = linear.name, tensors[linear.name].double()
                value += weight * (delta[name][p] @ matrix @ h[name][p])
                rows = value_rows[name]
                for k in range(p + 1, min(p + window, len(ids) - 1) + 1) if rows is not None else ():
                    average = attention[linear.layer].mean(0)[k, p]
                    value += weight * average * (delta[name][k][rows] @ matrix[rows] @ h[name][p])
            values.append(value)
        found[branch] = torch.stack(values).detach()
    return found
