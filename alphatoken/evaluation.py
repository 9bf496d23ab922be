"""What a model can do on given rows: loss of response tokens, multiple choice, exact answers. And how sure that is.

Every measure is a ratio of sums over rows r: value = sum_r s_r / sum_r c_r, with s the loss and c the tokens of a row,
or s = 1 where the row was solved and c = 1. Rows are independent, the tokens of one row are not, so with R rows

    u_r = (s_r - value c_r) / sum_r c_r,    standard error^2 = R / (R - 1) sum_r u_r^2

For the difference of two models u_r is the difference of their u_r: what makes a row hard for both cancels.

Sums are float64. Rows are batched by length; padding changes no value beyond floating-point rounding.
N response tokens, T positions, C choices of a question, R rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from alphatoken.baselines import forward_losses
from alphatoken.batching import make_batch, plan_batches
from alphatoken.evaluation_rows import Piece, Prompt, Question
from alphatoken.generation import generate
from alphatoken.model import ScoringModel
from alphatoken.tokenizer import end_of_turn_ids

Item = TypeVar("Item")

ITEMS_IN_MEMORY = 512  # sorted by length at a time

Tick = Callable[[float], None]  # called with the number of items that a batch has dealt with; parts of one too


@dataclass(frozen=True)
class RowSums:
    """One measure of one model, row by row: row id -> (s, c) of the module's docstring."""

    by_row: dict[int, tuple[float, int]]

    @property
    def total(self) -> float:
        return math.fsum(s for s, _ in self.by_row.values())

    @property
    def count(self) -> int:
        return sum(c for _, c in self.by_row.values())


@dataclass(frozen=True)
class Estimate:
    """A value and how much each row moves it: row id -> u."""

    value: float
    by_row: dict[int, float]

    @property
    def standard_error(self) -> float:
        """NaN from a single row."""
        rows = len(self.by_row)
        if rows < 2:
            return math.nan
        return math.sqrt(rows / (rows - 1) * math.fsum(u * u for u in self.by_row.values()))

    def exp(self) -> "Estimate":
        """Of a loss: the perplexity, its error to first order."""
        value = math.exp(self.value) if self.value < 709.0 else math.inf if self.value == self.value else math.nan
        return Estimate(value, {row: value * u for row, u in self.by_row.items()})

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Paired by row. A row that only one of both could use moves that one alone."""
        rows = self.by_row.keys() | other.by_row.keys()
        return Estimate(
            self.value - other.value, {row: self.by_row.get(row, 0.0) - other.by_row.get(row, 0.0) for row in rows}
        )


def estimate(rows: RowSums) -> Estimate:
    """The ratio of sums. Raises ValueError without rows."""
    if not rows.count:
        raise ValueError("there is no row to estimate from")
    value = rows.total / rows.count
    return Estimate(value, {row: (s - value * c) / rows.count for row, (s, c) in rows.by_row.items()})


# loss


def token_loss(
    scoring: ScoringModel, pieces: Iterable[Piece], batch_tokens: int, tick: Tick = lambda items: None
) -> RowSums:
    """Sum of the losses (nats) and number of the response tokens of every row; the pieces of a row are added up."""
    found: dict[int, tuple[float, int]] = {}
    for part in _parts(pieces):
        sequences = [(piece.input_ids, piece.response_mask) for piece in part]
        for piece, losses in zip(part, _losses(scoring, sequences, batch_tokens, len(part), tick), strict=True):
            before, count = found.get(piece.row_id, (0.0, 0))
            found[piece.row_id] = (before + float(losses.sum()), count + len(losses))
    return RowSums(found)


def _losses(
    scoring: ScoringModel,
    sequences: Sequence[tuple[list[int], list[bool]]],
    batch_tokens: int,
    items: int,
    tick: Tick,
) -> list[torch.Tensor]:
    """For every (input_ids T, response_mask T) the losses of its response tokens: (N,) float64 on the CPU.

    items: how many the sequences are of, for `tick`.
    """
    found: dict[int, torch.Tensor] = {}
    for group in plan_batches([len(ids) for ids, _ in sequences], batch_tokens):
        batch = make_batch([sequences[i][0] for i in group], [sequences[i][1] for i in group])
        losses = forward_losses(scoring, batch.to(scoring.device)).losses.double().cpu()
        found |= dict(zip(group, batch.split(losses), strict=True))
        tick(items * len(group) / len(sequences))
    return [found[i] for i in range(len(sequences))]


# multiple choice


def choice_accuracy(
    scoring: ScoringModel, questions: Iterable[Question], batch_tokens: int, tick: Tick = lambda items: None
) -> tuple[RowSums, RowSums]:
    """Whether the right choice is the likeliest: by log-likelihood, and by log-likelihood per character of its text
    (the usual normalisation: it does not depend on the tokenizer). A question with a NaN is not solved.
    """
    plain: dict[int, tuple[float, int]] = {}
    normalized: dict[int, tuple[float, int]] = {}
    for part in _parts(questions):
        sequences = [
            (ids, [position >= question.start for position in range(len(ids))])
            for question in part
            for ids in question.choices
        ]
        losses = iter(_losses(scoring, sequences, batch_tokens, len(part), tick))
        for question in part:
            totals = torch.stack([next(losses).sum() for _ in question.choices])  # C
            per_character = totals / torch.tensor(question.characters, dtype=totals.dtype)
            plain[question.row_id] = (_is_smallest(totals, question.answer), 1)
            normalized[question.row_id] = (_is_smallest(per_character, question.answer), 1)
    return RowSums(plain), RowSums(normalized)


def _is_smallest(losses: torch.Tensor, answer: int) -> float:
    return float(not losses.isnan().any() and int(losses.argmin()) == answer)


# exact answers


def answer_accuracy(
    scoring: ScoringModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    extract: Callable[[str], object],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    tick: Tick = lambda items: None,
) -> tuple[RowSums, int]:
    """Whether the greedy answer says what the reference says, after `extract` (a verifier); where that finds nothing
    (None) the answer is wrong. Also the number of answers that were cut at max_new_tokens.
    """
    ends = stop_ids(scoring, tokenizer)
    solved: dict[int, tuple[float, int]] = {}
    cut = 0
    for part in _parts(prompts):
        for group in _generation_groups([len(prompt.input_ids) + max_new_tokens for prompt in part], batch_tokens):
            answers = generate(scoring, [part[i].input_ids for i in group], max_new_tokens=max_new_tokens, end_ids=ends)
            for i, answer in zip(group, answers, strict=True):
                said = extract(tokenizer.decode(answer, skip_special_tokens=True))
                right = said is not None and said == extract(part[i].reference)
                solved[part[i].row_id] = (float(right), 1)
                cut += not ends.intersection(answer)
            tick(len(group))
    return RowSums(solved), cut


def stop_ids(scoring: ScoringModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those of the model, of the tokenizer and of the checkpoint's generation settings (for
    Gemma only these name the end of a turn).
    """
    ids = end_of_turn_ids(scoring.model.config, tokenizer)
    settings = getattr(scoring.model, "generation_config", None)
    more = getattr(settings, "eos_token_id", None)
    return ids.union(more if isinstance(more, list) else [] if more is None else [more])


def _generation_groups(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows of each batch, as plan_batches, but full ones: a step costs about the same for one row and for many."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and lengths[index] * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    stream = iter(items)
    while part := list(islice(stream, ITEMS_IN_MEMORY)):
        yield part
