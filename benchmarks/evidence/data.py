"""Training sets with noise that is known token by token.

    clean    GSM8K answers as they are
    mixed    half of the rows: a sixth each with wrong numbers, of another domain (code), with shuffled words
    tokens   GSM8K answers in which a fifth of the digits is another digit; the rest of each answer is good
    numbers  half of the rows with wrong numbers, nothing else

A row's `noise` marks exactly the response tokens that do not belong there.
"""

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from alphatoken.batching import Batch, make_batch, plan_batches
from alphatoken.encode import Encoder
from alphatoken.model import default_device

LONGEST = 160  # tokens of a row, prompt and chat template included
TRAINING_ROWS = 192
SETS = ("clean", "mixed", "tokens", "numbers")
NUMBERS_REPLACED = 1.0  # share of the digits of a row with wrong numbers that change
TOKENS_REPLACED = 0.2  # share of the digits that change in the set `tokens`


@dataclass(frozen=True)
class Row:
    """One encoded row. noise: T bool, true on response tokens that are wrong. kind: clean, numbers, domain..."""

    row_id: int
    input_ids: list[int]
    response_mask: list[bool]
    noise: list[bool]
    kind: str = "clean"

    @property
    def response_noise(self) -> np.ndarray:
        """bool, one entry per response token."""
        return np.asarray(self.noise)[np.asarray(self.response_mask)]

    @property
    def response_ids(self) -> np.ndarray:
        return np.asarray(self.input_ids)[np.asarray(self.response_mask)]


def read_lines(path: Path) -> list[dict]:
    """JSON lines, gzip or plain."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Source:
    """Encodes question-answer pairs and keeps those that are short enough."""

    def __init__(self, encoder: Encoder, longest: int = LONGEST) -> None:
        self.encoder, self.longest = encoder, longest

    def rows(self, pairs: list[tuple[str, str]], count: int, kind: str = "clean", first_id: int = 0) -> list[Row]:
        """The first `count` pairs of at most `longest` tokens."""
        found: list[Row] = []
        for question, answer in pairs:
            encoded = self.encoder.encode({"instruction": question, "response": answer})
            if len(encoded.input_ids) <= self.longest:
                noise = [kind != "clean" and flag for flag in encoded.response_mask]
                row = Row(first_id + len(found), encoded.input_ids, encoded.response_mask, noise, kind)
                found.append(row)
            if len(found) == count:
                return found
        raise ValueError(f"only {len(found)} of {count} rows of kind {kind} are short enough")


def corrupt_digits(row: Row, digit_ids: np.ndarray, share: float, rng: np.random.Generator, kind: str) -> Row:
    """Replace `share` of the response's digit tokens by other digits; noise marks those, and only those."""
    ids = np.array(row.input_ids)
    places = np.flatnonzero(np.isin(ids, digit_ids) & np.array(row.response_mask))
    chosen = rng.permutation(places)[: round(share * len(places))]
    for place in chosen:
        ids[place] = rng.choice(digit_ids[digit_ids != ids[place]])
    noise = np.zeros(len(ids), dtype=bool)
    noise[chosen] = True
    return replace(row, input_ids=ids.tolist(), noise=noise.tolist(), kind=kind)


def shuffled_words(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    return " ".join(words[i] for i in rng.permutation(len(words)))


def digit_tokens(tokenizer) -> np.ndarray:
    """Ids of the ten single digits."""
    vocabulary = tokenizer.get_vocab()
    return np.array([vocabulary[str(digit)] for digit in range(10)])


@dataclass(frozen=True)
class Task:
    """What one seed trains on: train in the order of training; validation is clean and of the target domain."""

    train: list[Row]
    validation: list[Row]


def make_task(
    name: str, seed: int, source: Source, gsm8k: list[dict], code: list[dict], validation_rows: int = 24,
    larger: int = 1,
) -> Task:  # fmt: skip
    """Draws rows by seed. The clean rows of a seed are the same in every set, so sets can be compared.

    larger: how many times as many rows as in the study of noise.
    """
    training_rows = TRAINING_ROWS * larger
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(gsm8k))
    pairs = [(gsm8k[i]["question"], gsm8k[i]["answer"]) for i in order]
    drawn = source.rows(pairs, training_rows + validation_rows)
    train, validation = drawn[:training_rows], drawn[training_rows:]
    digits = digit_tokens(source.encoder.tokenizer)
    noise_rng = np.random.default_rng([seed, 1])
    if name == "tokens":
        train = [corrupt_digits(row, digits, TOKENS_REPLACED, noise_rng, "tokens") for row in train]
    elif name == "numbers":
        half = training_rows // 2
        train[:half] = [corrupt_digits(r, digits, NUMBERS_REPLACED, noise_rng, "numbers") for r in train[:half]]
    elif name == "mixed":
        sixth = training_rows // 6
        train[:sixth] = [corrupt_digits(r, digits, NUMBERS_REPLACED, noise_rng, "numbers") for r in train[:sixth]]
        train[sixth : 2 * sixth] = _off_domain(source, code, sixth, noise_rng, sixth)
        train[2 * sixth : 3 * sixth] = _shuffled(source, pairs[:training_rows], sixth, noise_rng, 2 * sixth)
    elif name != "clean":
        raise ValueError(f"no set {name!r}; there are {', '.join(SETS)}")
    train = [train[i] for i in np.random.default_rng([seed, 2]).permutation(len(train))]
    return Task(train, validation)


def _off_domain(source: Source, code: list[dict], count: int, rng: np.random.Generator, first_id: int) -> list[Row]:
    pairs = [
        (f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"], row["response"])
        for row in (code[i] for i in rng.permutation(len(code)))
        if len(row["response"]) > 40
    ]
    return source.rows(pairs, count, "domain", first_id)


def _shuffled(
    source: Source, pairs: list[tuple[str, str]], count: int, rng: np.random.Generator, first_id: int
) -> list[Row]:
    mixed = [(question, shuffled_words(answer, rng)) for question, answer in pairs]
    return source.rows(mixed, count, "shuffled", first_id)


def batch_of(rows: list[Row]) -> Batch:
    """On the GPU where there is one, as the models are."""
    batch = make_batch([r.input_ids for r in rows], [r.response_mask for r in rows], [r.row_id for r in rows])
    return batch.to(default_device())


def batches_of(rows: list[Row], batch_tokens: int = 2048) -> list[tuple[list[int], Batch]]:
    """(indices into rows, batch) of rows of similar length."""
    groups = plan_batches([len(row.input_ids) for row in rows], batch_tokens)
    return [(group, batch_of([rows[i] for i in group])) for group in groups]
