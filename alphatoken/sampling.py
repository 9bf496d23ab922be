"""Seeded samples by transformers' generate: what runs where vLLM is not installed.

Each row draws with a generator of its own by the Gumbel trick: argmax(log p + g), g standard Gumbel noise, is a sample
of p. So a sample depends on its seed and its prompt, not on the rows around it (rounding aside), and temperature 0 is
the same without noise.

B prompts, T positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from alphatoken.generate_config import SamplingOptions
from alphatoken.generation import left_padded, plain_settings
from alphatoken.model import ScoringModel


@dataclass(frozen=True)
class Sample:
    """A response. token_ids with its end-of-turn token; text without it and without what stopped it."""

    token_ids: list[int]
    text: str
    logprobs: list[float] | None  # of the model itself, before temperature and top-p
    finish_reason: str  # stop or length


@torch.no_grad()
def draw_samples(
    scoring: ScoringModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    options: SamplingOptions,
    end_ids: set[int],
) -> list[Sample]:
    """One response per prompt and seed."""
    ids, mask = left_padded(prompts)
    draw = SeededDraw(seeds, options.temperature, options.top_p)
    stopping = [StopTexts(tokenizer, options.stop, ids.shape[1])] if options.stop else []
    with plain_settings(scoring):
        generated = scoring.model.generate(
            input_ids=ids.to(scoring.device),
            attention_mask=mask.to(scoring.device),
            max_new_tokens=options.max_new_tokens,
            eos_token_id=sorted(end_ids) or None,
            pad_token_id=min(end_ids, default=0),
            do_sample=False,  # `draw` leaves one token possible
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList(stopping),
        )
    answers = generated[:, ids.shape[1] :].tolist()
    logprobs = torch.stack(draw.logprobs, dim=1).tolist()  # BT
    return [finished(answer, row, tokenizer, options, end_ids) for answer, row in zip(answers, logprobs, strict=True)]


def finished(
    token_ids: list[int],
    logprobs: list[float] | None,
    tokenizer: PreTrainedTokenizerBase,
    options: SamplingOptions,
    end_ids: set[int],
) -> Sample:
    """A response up to its end: an end-of-turn token, a stop text, or the last token."""
    length = next((i + 1 for i, token in enumerate(token_ids) if token in end_ids), len(token_ids))
    stopped = bool(token_ids and token_ids[length - 1] in end_ids)
    # Not every end token is a special one.
    text = tokenizer.decode(token_ids[: length - stopped], skip_special_tokens=True)
    where = min((place for stop in options.stop if (place := text.find(stop)) >= 0), default=-1)
    if where >= 0:
        length, stopped = _tokens_up_to(token_ids[:length], options.stop, tokenizer), True
        text = text[:where]
    reason = "stop" if stopped or length < options.max_new_tokens else "length"
    return Sample(token_ids[:length], text, logprobs and logprobs[:length], reason)


def _tokens_up_to(token_ids: list[int], stops: list[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens it takes until a stop text is there."""
    for length in range(1, len(token_ids)):
        text = tokenizer.decode(token_ids[:length], skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return length
    return len(token_ids)


class StopTexts(StoppingCriteria):
    """Ends rows whose response has a stop text. transformers' own looks into special tokens too, `finished` does not:
    rows would end differently alone and beside longer ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class SeededDraw(LogitsProcessor):
    """Leaves the drawn token as the only possible one, and remembers its log-probability under the model."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p
        self.logprobs: list[torch.Tensor] = []  # of each step: B, on the CPU

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs_BV = scores.float().log_softmax(-1)
        drawn_B = self._draw(logprobs_BV)
        self.logprobs.append(logprobs_BV.gather(-1, drawn_B[:, None])[:, 0].cpu())
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, drawn_B[:, None], 0.0)

    def _draw(self, logprobs_BV: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return logprobs_BV.argmax(-1)
        tempered = logprobs_BV / self.temperature
        if self.top_p < 1:
            ordered, order = tempered.softmax(-1).sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # probability of the likelier tokens
            outside = (before >= self.top_p).scatter(-1, order, before >= self.top_p)
            tempered = tempered.masked_fill(outside, -torch.inf)
        noise = torch.stack([torch.rand(tempered.shape[-1], generator=g) for g in self.generators])
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
        return (tempered + gumbel.to(tempered.device)).argmax(-1)
