"""The data of a plan: every row counted, a sample of them encoded. Reads the tokenizer, no weights."""

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alphatoken.config import DataOptions
from alphatoken.encode import check_source
from alphatoken.errors import BadRowError, UserError
from alphatoken.model_encoder import make_encoder
from alphatoken.pair_encode import PairEncoder, check_pair_source, is_pair_data
from alphatoken.plan_config import PlanConfig
from alphatoken.sources import ReadUnit, SourceRow, plan_units, read_unit
from alphatoken.targets import validation_files
from alphatoken.tokenizer import load_tokenizer

ROWS_PER_REPORT = 500  # of progress


def check_data(config: PlanConfig, units: list[ReadUnit]) -> bool:
    """Whether the data are pairs. Raises UserError where a file's first row, or the tokenizer, cannot be used."""
    pairs = is_pair_data(config.objective, units, config.columns)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    if pairs:
        check_pair_source(units, config)
    else:
        check_source(units, config, tokenizer)
    if config.validation:
        check_source(plan_units(validation_files(config.validation)), config, tokenizer)
    return pairs


@dataclass(frozen=True)
class Sequences:
    """What the model sees of one row: the row itself, or both branches of a pair. One entry per sequence."""

    lengths: Sequence[int]
    responses: Sequence[int]  # response tokens
    spans: Sequence[int]  # positions from the first response token to the last
    truncated: bool


@dataclass(frozen=True)
class Survey:
    """Rows of the data: all counted, `sampled` of them encoded. Everything below `sampled` is about these."""

    rows: int
    largest_unit: int  # rows of the read unit with the most
    sampled: int
    unusable: dict[str, int]  # an example of each kind of reason -> rows
    truncated: int  # rows
    lengths: list[int]  # of sequences, in the order of the data
    responses: list[int]
    spans: list[int]
    seconds: float  # that encoding took

    @property
    def scale(self) -> float:
        """Rows of the data for each row of the sample."""
        return self.rows / self.sampled

    @property
    def unusable_rows(self) -> int:
        return sum(self.unusable.values())

    @property
    def tokens_per_second(self) -> float:
        """Of encoding, in one process."""
        return sum(self.lengths) / max(self.seconds, 1e-9)


def sequence_encoder(model: str, options: DataOptions, trust_remote_code: bool, pairs: bool) -> Callable:
    """A function from the data of a row to its Sequences; it raises BadRowError. Reads the tokenizer, no weights."""
    encoder = make_encoder(model, options, trust_remote_code)
    pair_encoder = PairEncoder(encoder)

    def encode(row: dict) -> Sequences:
        if pairs:
            found = pair_encoder.encode(row)
            responses = [len(found.chosen_ids), len(found.rejected_ids)]
            lengths = [len(found.prompt_ids) + count for count in responses]
            return Sequences(lengths, responses, responses, found.truncated)
        encoded = encoder.encode(row)
        responding = [position for position, is_response in enumerate(encoded.response_mask) if is_response]
        span = responding[-1] - responding[0] + 1
        return Sequences([len(encoded.input_ids)], [len(responding)], [span], encoded.truncated)

    return encode


def survey_rows(
    units: list[ReadUnit],
    encode: Callable[[dict], Sequences],
    sample_rows: int,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Survey:
    """Read every row once, encode at most `sample_rows` of them, each equally likely (reservoir sampling).

    Raises:
        UserError: no row of the sample can be used.
    """
    draw = random.Random(seed)
    sample: list[tuple[int, SourceRow]] = []
    per_unit: Counter[int] = Counter()
    rows = 0
    for number, unit in enumerate(units):
        for row in read_unit(unit):
            per_unit[number] += 1
            place = rows if rows < sample_rows else draw.randrange(rows + 1)
            if place < sample_rows:
                sample[place : place + 1] = [(rows, row)]
            rows += 1
            if progress and rows % ROWS_PER_REPORT == 0:
                progress("rows read", rows, None)
    started = time.perf_counter()
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    sequences = []
    for number, (_, row) in enumerate(sorted(sample, key=lambda item: item[0])):
        if progress and number % ROWS_PER_REPORT == 0:
            progress("rows encoded", number, len(sample))
        try:
            if row.data is None:
                raise BadRowError(row.error)
            sequences.append(encode(row.data))
        except BadRowError as error:
            kind = re.sub(r"\d+", "#", str(error))  # the same reason, whatever the numbers in it
            examples.setdefault(kind, str(error))
            reasons[kind] += 1
    if not sequences:
        shown = "; ".join(examples[kind] for kind, _ in reasons.most_common(3)) or "the input has no rows"
        raise UserError(f"no row can be used: {shown}")
    return Survey(
        rows=rows,
        largest_unit=max(per_unit.values()),
        sampled=len(sample),
        unusable={examples[kind]: count for kind, count in reasons.most_common()},
        truncated=sum(row.truncated for row in sequences),
        lengths=[length for row in sequences for length in row.lengths],
        responses=[count for row in sequences for count in row.responses],
        spans=[count for row in sequences for count in row.spans],
        seconds=time.perf_counter() - started,
    )
