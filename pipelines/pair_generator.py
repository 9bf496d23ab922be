"""Fresh preference pairs for a window: responses of the weights of that moment, judged by a verifier.

Runs in the scoring actor, on the model that it holds: few prompts do not pay for moving weights into an engine.
`alphatoken generate` and `alphatoken pair` do the same for a whole data set, with vLLM.
"""

import pyarrow as pa

from alphatoken import schema
from alphatoken.batching import plan_batches
from alphatoken.errors import BadRowError
from alphatoken.evaluation import stop_ids
from alphatoken.failed_batches import check_set_up, reason_of, with_halves
from alphatoken.generate_config import SamplingOptions
from alphatoken.model import ScoringModel
from alphatoken.pairing import Candidate, best_against_worst, distinct
from alphatoken.rounds_config import RoundsConfig
from alphatoken.sampling import Sample, draw_samples
from alphatoken.tokenizer import load_tokenizer
from alphatoken.verifiers import load_verifier, score_response
from pipelines.engines import sample_seed

PAIRS = pa.schema([*schema.ENCODED_PAIRS, pa.field("row_index", pa.int64())])


class PairGenerator:
    """ENCODED_PROMPTS to ENCODED_PAIRS: at most one pair a prompt."""

    def __init__(self, config: RoundsConfig, scoring: ScoringModel, folder: str) -> None:
        """folder: where the user's own verifier is looked for."""
        self.config, self.scoring = config, scoring
        self.verify = load_verifier(config.verifier, folder)
        self.tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        self.ends = stop_ids(scoring, self.tokenizer)
        self.options = SamplingOptions(
            temperature=config.temperature, max_new_tokens=config.max_new_tokens, stop=config.stop
        )

    def __call__(self, prompts: pa.Table, step: int) -> tuple[pa.Table, dict[int, str]]:
        """(pairs of the prompts that give one, with their `row_index`; {row number: why there is none} of the others).

        Samples differ from step to step.
        """
        rows = prompts.to_pylist()
        reasons: dict[int, str] = {}
        found = []
        for number, (row, samples) in enumerate(zip(rows, self._answers(rows, step), strict=True)):
            try:
                pair = self._pair(row, samples)
            except BadRowError as error:
                reasons[number] = str(error)
                continue
            kept = {name: row[name] for name in ("row_id", "id", "prompt_ids", "row_index")}
            found.append(kept | pair | {"truncated": False})
        return pa.Table.from_pylist(found, schema=PAIRS), reasons

    def lengths(self, prompts: pa.Table) -> list[int]:
        """Positions that the responses to each prompt take at most, with it."""
        longest = self.config.max_new_tokens
        return [self.config.generate * (len(ids) + longest) for ids in prompts["prompt_ids"].to_pylist()]

    def _answers(self, rows: list[dict], step: int) -> list[list[Sample] | str]:
        """The samples of each prompt, or why there are none."""
        count = self.config.generate
        prompts = [row["prompt_ids"] for row in rows for _ in range(count)]
        seeds = [sample_seed(self.config.seed + step, row["row_id"], n) for row in rows for n in range(count)]
        drawn: dict[int, Sample] = {}
        errors: dict[int, Exception] = {}
        lengths = [len(prompt) + self.config.max_new_tokens for prompt in prompts]

        def draw(group: list[int]) -> list[Sample]:
            mine = [prompts[i] for i in group], [seeds[i] for i in group]
            return draw_samples(self.scoring, self.tokenizer, *mine, self.options, self.ends)

        for group in plan_batches(lengths, self.config.batch_tokens):
            for part, samples in with_halves(draw, group, errors):
                drawn |= dict(zip(part, samples, strict=True))
        if not drawn:
            check_set_up(errors)
        answers: list[list[Sample] | str] = []
        for first in range(0, len(prompts), count):
            mine = range(first, first + count)
            failed = next((i for i in mine if i in errors), None)
            if failed is None:
                answers.append([drawn[i] for i in mine])
            else:
                answers.append(f"no response could be generated: {reason_of(errors[failed], lengths[failed])}")
        return answers

    def _pair(self, row: dict, samples: list[Sample] | str) -> dict:
        """Raises BadRowError with the reason why there is no pair."""
        if isinstance(samples, str):
            raise BadRowError(samples)
        candidates = distinct(
            [Candidate(n, s.text, s.token_ids, s.finish_reason == "stop") for n, s in enumerate(samples)]
        )
        scores = [score_response(self.verify, candidate.text, row["answer"]) for candidate in candidates]
        pairs = best_against_worst(candidates, scores)
        if isinstance(pairs, str):
            raise BadRowError(pairs)
        return {"chosen_ids": pairs[0].chosen.token_ids, "rejected_ids": pairs[0].rejected.token_ids}
