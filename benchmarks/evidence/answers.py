"""Exact answers: how many held-out problems a trained model solves, by greedy decoding."""

import torch

from alphatoken.encode import Encoder
from alphatoken.evaluation import answer_accuracy, estimate
from alphatoken.evaluation_rows import RowReader, final_number
from alphatoken.model import ScoringModel, load_model
from benchmarks.evidence.suffix import trained_parameters

LONGEST_PROMPT = 120  # tokens
LONGEST_ANSWER = 160
BATCH_TOKENS = 16_384


class AnswerCheck:
    """The whole model again, its last layers those of a trained suffix."""

    def __init__(self, model: str, encoder: Encoder, problems: list[dict], count: int) -> None:
        """problems: `question`, `answer`. The first `count` with short prompts are asked."""
        self.scoring, self.tokenizer = load_model(model, "float32"), encoder.tokenizer
        reader = RowReader(encoder, "number", LONGEST_PROMPT + LONGEST_ANSWER)
        read = (reader.prompt(i, {"instruction": row["question"], "response": row["answer"]})
                for i, row in enumerate(problems))  # fmt: skip
        self.prompts = [prompt for prompt in read if len(prompt.input_ids) <= LONGEST_PROMPT][:count]

    def load(self, scoring: ScoringModel) -> None:
        """Takes over the trained layers of a suffix (suffix.load_suffix)."""
        below = len(self.scoring.model.model.layers) - len(scoring.model.model.layers)
        own = dict(self.scoring.model.named_parameters())
        with torch.no_grad():
            for name, weight in trained_parameters(scoring).items():
                head, _, rest = name.partition(".layers.")
                number, _, rest = rest.partition(".")
                own[f"{head}.layers.{int(number) + below}.{rest}"].copy_(weight)

    def solved(self) -> dict[str, float | int]:
        """Share of the problems whose final number is right; cut: answers that were not ended."""
        by_row, cut = answer_accuracy(
            self.scoring, self.tokenizer, self.prompts, final_number, max_new_tokens=LONGEST_ANSWER,
            batch_tokens=BATCH_TOKENS,
        )  # fmt: skip
        solved = estimate(by_row)
        found = {"solved": solved.value, "standard_error": solved.standard_error}
        return {"problems": len(self.prompts), "cut": cut, **found}
