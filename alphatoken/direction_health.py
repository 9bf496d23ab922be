"""How far a validation direction can be trusted: two figures that warn of what made masks hurt.

class shares   how much of <G, G> = sum over validation tokens of <grad l_t, G> each token class brings: a few format
               tokens can hold most of a direction
agreement      rank correlation of the values of training tokens along the gradients of two halves of the validation
               rows: what another choice of validation rows would have left of them
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alphatoken.batching import Batch
from alphatoken.direction import Tensors
from alphatoken.exact import Exact
from alphatoken.model import ScoringModel
from alphatoken.token_classes import TOKEN_CLASS_NAMES

HEAVY_SHARE = 0.5  # of the direction, in a class that has less than half of that share of the tokens
LEAST_AGREEMENT = 0.5


@dataclass(frozen=True)
class ClassShare:
    """A token class: its share of the direction and of the validation tokens."""

    direction: float
    tokens: float


def class_shares(
    scoring: ScoringModel,
    parameters: str,
    direction: Tensors,
    batches: Sequence[Batch],
    class_of: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    method: str = "forward",
) -> dict[str, ClassShare]:
    """By name of the class. direction: not preconditioned; class_of V: class of each token id; class_weights V."""
    exact = Exact(scoring, parameters, direction, method=method)
    values = torch.zeros(len(TOKEN_CLASS_NAMES), dtype=torch.float64)
    counts = torch.zeros_like(values)
    for batch in batches:
        found = exact(batch).adaptation.double().cpu()
        found = found.where(found.isfinite(), 0)  # of a row that the direction leaves out
        targets = batch.targets.cpu()
        if class_weights is not None:
            found *= class_weights.cpu()[targets]
        classes = class_of[targets].long()
        values.index_add_(0, classes, found)
        counts += torch.bincount(classes, minlength=len(counts))
    shares = (values / (values.sum() or 1)).tolist(), (counts / counts.sum()).tolist()  # 0 where no class has a weight
    return {name: ClassShare(*pair) for name, *pair in zip(TOKEN_CLASS_NAMES, *shares, strict=True)}


def agreement(
    scoring: ScoringModel,
    parameters: str,
    halves: Sequence[Tensors],
    batches: Sequence[Batch],
    method: str = "forward",
) -> float:
    """Spearman's correlation of the values of `batches` along both directions."""
    estimators = (Exact(scoring, parameters, half, method=method) for half in halves)
    first, second = (np.concatenate([e(batch).adaptation.cpu().numpy() for batch in batches]) for e in estimators)
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(np.float64)  # ties are rare among real values


def concerns(shares: dict[str, ClassShare], found_agreement: float | None, num_rows: int) -> list[str]:
    """What is wrong with a direction, a sentence each; empty where nothing is."""
    sentences = [
        f"{share.direction:.0%} of the validation direction comes from {name} tokens, which are {share.tokens:.0%} of "
        f"the validation tokens: values may be mostly about them; try --class-weights {name}=0 or --normalization "
        "sequence"
        for name, share in shares.items()
        if share.direction > HEAVY_SHARE and share.tokens < share.direction / 2
    ]
    if found_agreement is not None and found_agreement < LEAST_AGREEMENT:
        sentences.append(
            f"values along two halves of the {num_rows} validation rows agree with a rank correlation of only "
            f"{found_agreement:.2f}: other rows of the same task would give other masks; give more validation rows"
        )
    return sentences
