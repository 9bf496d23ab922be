"""Training losses row by row, without batches, padding or trainers: what the trainers are checked against."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from tests.masked_folder import SIDES


def logprobs(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """(T,) log-probability of every token, zero for the first."""
    tensor = torch.tensor([ids])
    found = model(input_ids=tensor).logits[0, :-1].log_softmax(-1)
    return torch.cat([found.new_zeros(1), found[torch.arange(len(ids) - 1), tensor[0, 1:]]])


def sft(model: nn.Module, rows: list[dict], normalize: str = "kept") -> torch.Tensor:
    total, count = 0.0, 0.0
    for row in rows:
        weights = row.get("weights") or [float(label != -100) for label in row["labels"]]
        weights = torch.tensor([0.0, *weights[1:]], dtype=torch.float32)
        total = total - (logprobs(model, row["input_ids"]) * weights).sum()
        count += float(weights.sum()) if normalize == "kept" else sum(row["response_mask"][1:])
    return total / count


def pair_sums(model: nn.Module, row: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each side the log-probability of the whole response, and of its kept tokens."""
    found = {}
    for side in SIDES:
        prompt = row["prompt_ids"]
        response = logprobs(model, prompt + row[f"{side}_ids"])[len(prompt) :]
        found[side] = response.sum(), response[torch.tensor(row[f"{side}_mask"])].sum()
    return found


def reference_columns(reference: nn.Module, row: dict) -> dict[str, float | list[float]]:
    """Of a pair, as `score` stores them: the log-probability of each response token, and their sum."""
    found: dict[str, float | list[float]] = {}
    for side in SIDES:
        prompt = row["prompt_ids"]
        with torch.no_grad():
            each = logprobs(reference, prompt + row[f"{side}_ids"])[len(prompt) :].tolist()
        found |= {f"{side}_ref_logprobs": each, f"ref_{side}_logps": sum(each)}
    return found


def dpo_gradient(
    model: nn.Module, reference: nn.Module, rows: list[dict], beta: float, mode: str
) -> list[torch.Tensor]:
    """Mean over pairs of -omega * (sum over kept chosen of grad log pi - the same over rejected)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for row in rows:
        ours = pair_sums(model, row)
        with torch.no_grad():
            theirs = pair_sums(reference, row)
        part = 0 if mode == "loss" else 1
        chosen, rejected = (ours[side][part].item() - theirs[side][part].item() for side in SIDES)
        omega = beta * torch.sigmoid(torch.tensor(-beta * (chosen - rejected), dtype=torch.float64)).item()
        step = -omega * (ours["chosen"][1] - ours["rejected"][1])
        for whole, piece in zip(total, torch.autograd.grad(step, parameters), strict=True):
            whole += piece / len(rows)
    return total


def dpo_loss(model: nn.Module, reference: nn.Module, rows: list[dict], beta: float, mode: str) -> float:
    part, total = (0 if mode == "loss" else 1), 0.0
    with torch.no_grad():
        for row in rows:
            ours, theirs = pair_sums(model, row), pair_sums(reference, row)
            chosen, rejected = (ours[side][part] - theirs[side][part] for side in SIDES)
            total -= logsigmoid(beta * (chosen - rejected)).item()
    return total / len(rows)


def gradient(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss(model), [p for p in model.parameters() if p.requires_grad]))


def assert_same_gradient(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    """Relative to the largest entry of the whole gradient. (transformers' norms and softmax round to float32.)"""
    scale = max(part.abs().max() for part in expected)
    assert scale > 1e-3
    worst = max((a.double() - b.double()).abs().max() for a, b in zip(found, expected, strict=True))
    assert worst <= tolerance * scale, f"differs by {worst / scale:.2g} of the largest entry"
