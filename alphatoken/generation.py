"""The likeliest responses by transformers' own generate: what evaluation asks for.

B prompts, T positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig

from alphatoken.model import ScoringModel


@torch.no_grad()
def generate(
    scoring: ScoringModel, prompts: list[list[int]], *, max_new_tokens: int, end_ids: set[int]
) -> list[list[int]]:
    """One greedy response per prompt, up to and including its end-of-turn token."""
    ids, mask = left_padded(prompts)
    with plain_settings(scoring):
        generated = scoring.model.generate(
            input_ids=ids.to(scoring.device),
            attention_mask=mask.to(scoring.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(end_ids) or None,
            pad_token_id=min(end_ids, default=0),
            do_sample=False,
        )
    return [until_end(answer, end_ids) for answer in generated[:, ids.shape[1] :].tolist()]


def left_padded(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids BT, attention mask BT), padded on the left: responses begin together."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = torch.tensor(prompt)
        mask[b, width - len(prompt) :] = 1
    return ids, mask


@contextmanager
def plain_settings(scoring: ScoringModel) -> Iterator[None]:
    """Without the checkpoint's own generation settings (penalties, minimum lengths): no part of the weights."""
    model = scoring.model
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


def until_end(answer: list[int], end_ids: set[int]) -> list[int]:
    """Tokens up to and including the first end-of-turn token."""
    for index, token in enumerate(answer):
        if token in end_ids:
            return answer[: index + 1]
    return answer
